"""`accelerate`: existing models served by the ops, in place; which modules, by what adapter, why others are left."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Union

from torch import nn

from interformer_kernels import _checks as checks
from interformer_kernels.nn._calls import Calls, count_served, count_unserved, follow

# Given a module of its class: the subclass whose `forward` serves it, or why the module is left as it is.
Adapter = Callable[[nn.Module], Union[type[nn.Module], str]]

# Classes known by name, and the file that registers their adapters: imported when a model has such a class.
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
        name: its path in the model, as `named_modules` has it; empty for the model itself.
        kind: the name of its class before.
        swapped: whether it is served by the ops now (with `dry_run`: would be).
        why: why it is left; empty where it is swapped.
        serves: which calls a swapped module's class serves, where that class says so (its attribute ``serves``).
        calls: how its calls went since it was swapped; kept up to date. With `dry_run` there are none.
    """

    name: str
    kind: str
    swapped: bool
    why: str = ""
    serves: str = ""
    calls: Calls = field(default_factory=Calls, compare=False)


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did with each module; ``print`` it, before the model is used and after.

    That a module is swapped does not say that the ops serve its calls: callers may ask for attention weights (PyTorch's
    default), or train with dropout. :meth:`calls` counts those served and those not, with the reasons.

    Attributes:
        entries: every module of the model, in the order of `named_modules`.
        dry_run: whether the model was left untouched.
    """

    entries: tuple[Entry, ...]
    dry_run: bool = False

    @property
    def swapped(self) -> tuple[Entry, ...]:
        """The modules whose class is another now (with ``dry_run``: would be), and serves what it can."""
        return tuple(entry for entry in self.entries if entry.swapped)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The modules that are as they were, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.swapped)

    def calls(self) -> dict[str, Calls]:
        """By the name of each swapped module, how many calls the ops have served by now, and how many not and why.

        Modules of a class of yours count when they say so: ``served(self)``, ``unserved(self, why)`` in their forward.
        """
        return {entry.name: entry.calls for entry in self.swapped}

    def __str__(self) -> str:
        """Each swapped module, what it serves and has served; then the classes that are left, how many, and why."""
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
    """Teach :func:`accelerate` a class of modules.

    An adapter answers for one module of just this class: with the subclass of it whose ``forward`` serves the module,
    or with a string: why this module is left. The module's class is then changed, and counts of its calls are hung on
    it, nothing else: parameters, buffers, hooks, ``state_dict`` keys and whatever holds the module stay. So the
    subclass must compute what its parent does, from the attributes that its parent's ``__init__`` made (its own is not
    run), and it should stand at the top level of a file, so that it can be pickled::

        class FastPool(Pool):
            def forward(self, x, mask):
                values, offsets, _ = from_padded(x, mask=mask)
                return pma_pooling(self.seeds, self.key(values), self.value(values), offsets)

        register_adapter(Pool, lambda pool: "it has a bias" if pool.bias else FastPool)

    Args:
        kind: the class; modules of its subclasses are not meant, their ``forward`` may differ. A later adapter for the
            same class replaces the earlier one.
        adapter: from the module to a subclass of ``kind``, or to the reason for leaving it.

    Raises:
        TypeError: ``kind`` is not a class of modules, or the adapter cannot be called.
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise TypeError(f"register_adapter: kind must be a subclass of torch.nn.Module, found {checks.describe(kind)}")
    if not callable(adapter):
        raise TypeError(f"register_adapter: adapter must be callable, found {checks.describe(adapter)}")
    _adapters[kind] = adapter


def accelerate(model: nn.Module, *, dry_run: bool = False) -> Report:
    """Let the ops serve, in place, those modules of a model that they can serve exactly.

    Outputs and gradients stay what they were, within rounding; parameters, buffers, hooks, ``state_dict`` keys and
    ``isinstance`` stay as they are: a swapped module's class becomes a subclass of the one it had. Known are

    - ``torch.nn.MultiheadAttention``: key padding masks (padding left, right or with holes), causal masks, other keys
      and values than queries. Rows whose keys are all padding get zeros from the attention (where PyTorch's inference
      path gives NaN), and finite gradients.
    - ``torch.nn.TransformerEncoderLayer``: the same, and its fused inference path is no longer taken.
    - ``torch.nn.TransformerEncoder``, where PyTorch itself would drop padding at inference (``enable_nested_tensor``
      and what it asks for): the batch is packed once, goes through all layers, and is padded again. At padding its
      output is that of zeros then, in training too, as PyTorch's is at inference.
    - torch_geometric's ``SetTransformerAggregation`` and ``PoolingByMultiheadAttention``: nothing is padded inside.
    - what :func:`register_adapter` was told.

    A call that a swapped module cannot serve takes the original path, which is still there, says so once in the log,
    and is counted in the report: ``need_weights=True`` (PyTorch's default), dropout in training, causal masks beside
    padding with holes, other masks, nested tensors, padding masks under ``torch.compile``, where the number of tokens
    would be data, masks that differ under ``vmap``, and forward-mode derivatives.

    Args:
        model: any module; it may be one of these itself. Accelerate it before it is compiled, sharded or wrapped.
        dry_run: only report; the model is left untouched.

    Returns:
        The :class:`Report`: each module, swapped, or left and why.

    Raises:
        TypeError: ``model`` is not a module, or an adapter answers with something else than a subclass or a reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, found {checks.describe(model)}")
    checks.check_bool("accelerate", "dry_run", dry_run)
    entries = []
    for name, module in list(model.named_modules()):
        kind, answer = type(module), _answer(module)
        swapped = not isinstance(answer, str)
        if isinstance(answer, str):
            entries.append(Entry(name, kind.__name__, swapped, answer))
            continue
        calls = Calls()
        if not dry_run:
            module.__class__ = answer
            calls = follow(module)
        entries.append(Entry(name, kind.__name__, swapped, "", getattr(answer, "serves", ""), calls))
    return Report(tuple(entries), dry_run)


def served(module: nn.Module) -> None:
    """For the ``forward`` of a swapped class of yours: count this call as served by the ops."""
    count_served(module)


def unserved(module: nn.Module, why: str) -> None:
    """For the ``forward`` of a swapped class of yours: count this call as not served, and say so once in the log."""
    count_unserved(module, type(module).__name__, f"its original path for {why}")


def _answer(module: nn.Module) -> type[nn.Module] | str:
    """The class that shall serve this module, or why there is none."""
    kind = type(module)
    adapter = _adapter(kind)
    if adapter is None:
        known = next((parent for parent in kind.__mro__[1:] if _adapter(parent) is not None), None)
        if known is None:
            return "no adapter is registered for this class"
        if _adapters[known](module) is kind:
            return "it is swapped already"
        return f"a subclass of {known.__name__}, whose forward may differ; register_adapter can name one for it"
    answer = adapter(module)
    if isinstance(answer, str) or (isinstance(answer, type) and issubclass(answer, kind)):
        return answer
    wanted = f"a subclass of {kind.__name__}, or a string that says why the module is left"
    raise TypeError(f"accelerate: the adapter of {kind.__name__} must answer with {wanted}; found {answer!r}")


def _adapter(kind: type) -> Adapter | None:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind not in _adapters and name in _KNOWN:
        importlib.import_module(_KNOWN[name])
    return _adapters.get(kind)
