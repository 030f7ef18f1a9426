"""`accelerate`: swaps modules of an existing model, in place, for subclasses that the ops serve; and its report."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Union

from torch import nn

from interformer_kernels import _checks as checks
from interformer_kernels.nn._calls import Calls, count_served, count_unserved, start_counting

# Maps a module of its class to the subclass whose `forward` serves it, or to the reason for leaving the module.
Adapter = Callable[[nn.Module], Union[type[nn.Module], str]]

# Class names, and the file that registers their adapters: it is imported when a model has such a class.
_KNOWN = {
    "torch.nn.modules.activation.MultiheadAttention": "interformer_kernels.nn._torch",
    "torch.nn.modules.transformer.TransformerEncoderLayer": "interformer_kernels.nn._torch",
    "torch.nn.modules.transformer.TransformerEncoder": "interformer_kernels.nn._torch",
    "torch_geometric.nn.aggr.utils.PoolingByMultiheadAttention": "interformer_kernels.nn._torch_geometric",
    "torch_geometric.nn.aggr.set_transformer.SetTransformerAggregation": "interformer_kernels.nn._torch_geometric",
}
_adapters: dict[type[nn.Module], Adapter] = {}


@dataclass(frozen=True)
class Entry:
    """One module of the model.

    Attributes:
        name: its path in the model, as in `named_modules`; empty for the model itself.
        kind: the name of its original class.
        swapped: whether its class was swapped (with `dry_run`: would be).
        why: the reason for leaving it; empty if it is swapped.
        serves: the calls that the swapped class serves, from its attribute ``serves`` if it has one.
        calls: counts of its calls since it was swapped, kept up to date; none with `dry_run`.
    """

    name: str
    kind: str
    swapped: bool
    why: str = ""
    serves: str = ""
    calls: Calls = field(default_factory=Calls, compare=False)


@dataclass(frozen=True)
class Report:
    """The result of :func:`accelerate` for each module; ``print`` it before and after the model is used.

    A swapped module is not yet a served one: callers may ask for attention weights (PyTorch's default), or pass
    other masks. :meth:`calls` counts the calls that were served and those that were not, with reasons.

    Attributes:
        entries: every module of the model, in the order of `named_modules`.
        dry_run: whether the model was left untouched.
    """

    entries: tuple[Entry, ...]
    dry_run: bool = False

    @property
    def swapped(self) -> tuple[Entry, ...]:
        """The modules whose class was swapped (with ``dry_run``: would be)."""
        return tuple(entry for entry in self.entries if entry.swapped)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The modules that were not changed, each with the reason."""
        return tuple(entry for entry in self.entries if not entry.swapped)

    def calls(self) -> dict[str, Calls]:
        """Counts of served and unserved calls so far, by the name of each swapped module.

        The ``forward`` of your own subclass counts its calls by ``served(self)`` and ``unserved(self, why)``.
        """
        return {entry.name: entry.calls for entry in self.swapped}

    def __str__(self) -> str:
        """Each swapped module, the calls it serves and has served; then the classes that are left, with reasons."""
        verb = "would be swapped" if self.dry_run else "swapped"
        lines = [f"{len(self.swapped)} of {len(self.entries)} modules {verb}"]
        for entry in self.swapped:
            lines.append(f"  {verb}: {entry.name or '(the model)'} ({entry.kind})")
            lines += [f"    serves {entry.serves}"] if entry.serves else []
            lines += [f"    {entry.calls}"] if entry.calls.served or entry.calls.unserved else []
        reasons = Counter((entry.kind, entry.why) for entry in self.left)
        lines += [f"  left: {count} {kind}: {why}" for (kind, why), count in reasons.items()]
        return "\n".join(lines)


def register_adapter(kind: type[nn.Module], adapter: Adapter) -> None:
    """Make :func:`accelerate` swap modules of a class.

    An adapter takes one module of exactly this class, and returns the subclass whose ``forward`` serves the module, or
    a string with the reason for leaving it. Swapping changes the module's ``__class__`` and attaches counts of its
    calls, nothing else: parameters, buffers, hooks, ``state_dict`` keys and references to the module stay. The
    subclass must therefore compute the same as its parent, from the attributes that the parent's ``__init__`` made (its
    own is not run). Define it at the top level of a file, so that it can be pickled::

        class FastPool(Pool):
            def forward(self, x, mask):
                values, offsets, _ = from_padded(x, mask=mask)
                return pma_pooling(self.seeds, self.key(values), self.value(values), offsets)

        register_adapter(Pool, lambda pool: "it has a bias" if pool.bias else FastPool)

    Args:
        kind: the class. Its subclasses are not included, since their ``forward`` may differ. A later adapter for the
            same class replaces the earlier one.
        adapter: a function from the module to a subclass of ``kind``, or to the reason for leaving it.

    Raises:
        TypeError: ``kind`` is not a class of modules, or the adapter is not callable.
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise TypeError(f"register_adapter: kind must be a subclass of torch.nn.Module, found {checks.describe(kind)}")
    if not callable(adapter):
        raise TypeError(f"register_adapter: adapter must be callable, found {checks.describe(adapter)}")
    _adapters[kind] = adapter


def accelerate(model: nn.Module, *, dry_run: bool = False) -> Report:
    """Swap, in place, the modules of a model that the ops can serve exactly.

    Outputs and gradients stay equal within rounding. Parameters, buffers, hooks, ``state_dict`` keys and ``isinstance``
    are not affected, because a swapped module's class becomes a subclass of its original class. These classes are
    swapped:

    - ``torch.nn.MultiheadAttention``: key padding masks (padding left, right or with holes), an ``attn_mask`` that is
      causality, a window or padding in disguise, cross attention. Queries that see no key get zeros from the attention
      (where PyTorch's inference path gives NaN), and finite gradients.
    - ``torch.nn.TransformerEncoderLayer``: the same; its fused inference path is no longer taken.
    - ``torch.nn.TransformerEncoder``, if PyTorch itself would drop padding at inference (``enable_nested_tensor`` and
      its conditions): the batch is packed once for all layers and padded again at the end. At padding, its output is
      then that of zero inputs, as in PyTorch's inference path, in training too.
    - torch_geometric's ``SetTransformerAggregation`` and ``PoolingByMultiheadAttention``: they run without padding.
    - classes given to :func:`register_adapter`.

    A call that a swapped module cannot serve takes the original path, logs one warning, and is counted in the report:
    ``need_weights=True`` (PyTorch's default), causal masks or windows together with padding that has holes, other
    masks, nested tensors, padding masks under ``torch.compile`` (the number of tokens would depend on data), masks that
    differ under ``vmap``, and forward-mode derivatives.

    An ``attn_mask`` is ``[L, S]`` or ``[B * H, L, S]``, with equal heads, bool or of 0 and ``-inf`` (or numbers up to
    ``-1e8``; in float16, its least), and served if its entries are exactly those of some ``lower <= j - i <= upper``,
    hidden keys and hidden queries: causality from either end, windows, padding left or right, all of them in one mask
    or beside a ``key_padding_mask``. It is read once for all layers and calls, and again when it was written to.
    Writes through ``mask.data`` escape PyTorch's count of writes, and are noticed in masks of up to 65536 entries. With
    ``is_causal=True``, no padding and as many queries as keys it is not read, as in PyTorch. A mask that hides all keys
    of a query by finite numbers is left, since PyTorch then lets the query see them all.

    Args:
        model: any module, also one of these classes itself. Accelerate it before it is compiled, sharded or wrapped.
        dry_run: only report; the model is not changed.

    Returns:
        The :class:`Report`: each module, swapped, or left with the reason.

    Raises:
        TypeError: ``model`` is not a module, or an adapter returns neither a subclass nor a string.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, found {checks.describe(model)}")
    checks.check_bool("accelerate", "dry_run", dry_run)
    entries = []
    for name, module in list(model.named_modules()):
        kind, subclass_or_reason = type(module), _subclass_or_reason(module)
        if isinstance(subclass_or_reason, str):
            entries.append(Entry(name, kind.__name__, False, subclass_or_reason))
            continue
        calls = Calls()
        if not dry_run:
            module.__class__ = subclass_or_reason
            calls = start_counting(module)
        entries.append(Entry(name, kind.__name__, True, "", getattr(subclass_or_reason, "serves", ""), calls))
    return Report(tuple(entries), dry_run)


def served(module: nn.Module) -> None:
    """Count this call as served by the ops; for the ``forward`` of your own subclass."""
    count_served(module)


def unserved(module: nn.Module, why: str) -> None:
    """Count this call as not served, and log one warning; for the ``forward`` of your own subclass."""
    count_unserved(module, type(module).__name__, "its original path", why)


def _subclass_or_reason(module: nn.Module) -> type[nn.Module] | str:
    """The subclass that serves this module, or the reason for leaving it."""
    kind = type(module)
    adapter = _adapter(kind)
    if adapter is None:
        adapted = next((parent for parent in kind.__mro__[1:] if _adapter(parent) is not None), None)
        if adapted is None:
            return "no adapter is registered for this class"
        if _adapters[adapted](module) is kind:
            return "it is swapped already"
        return f"a subclass of {adapted.__name__}, whose forward may differ; register_adapter can name one for it"
    result = adapter(module)
    if isinstance(result, str) or (isinstance(result, type) and issubclass(result, kind)):
        return result
    expected = f"a subclass of {kind.__name__}, or a string with the reason for leaving the module"
    raise TypeError(f"accelerate: the adapter of {kind.__name__} must return {expected}; found {result!r}")


def _adapter(kind: type) -> Adapter | None:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind not in _adapters and name in _KNOWN:
        importlib.import_module(_KNOWN[name])
    return _adapters.get(kind)
