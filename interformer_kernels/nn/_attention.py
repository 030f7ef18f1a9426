"""What the attention modules share: the parameters of `torch.nn.MultiheadAttention`, and dropout's way round ops."""

from __future__ import annotations

import math
from typing import Any, TypeVar, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels.nn._notices import say_once
from interformer_kernels.ops.gated_cross_attention import gated_cross_attention

PARAMETERS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


class AttentionModule(nn.Module):
    """Projections under the names, shapes and start of `torch.nn.MultiheadAttention`, so that state dicts are shared.

    `in_proj_weight [3 E, E]` (`q_proj_weight [E, E]`, `k_proj_weight [E, kdim]`, `v_proj_weight [E, vdim]` where the
    keys or values have another width), `in_proj_bias [3 E]`, `out_proj`.
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        bias: bool,
        kdim: int | None,
        vdim: int | None,
        batch_first: bool,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        name = type(self).__name__
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kdim": kdim, "vdim": vdim}
        checked: Any = (
            None if size is None and argument in ("kdim", "vdim") else checks.check_count(name, argument, size, least=1)
            for argument, size in sizes.items()
        )
        embed_dim, num_heads, kdim, vdim = checked
        checks.backend_name(name, backend)
        if embed_dim % num_heads:
            raise ValueError(f"{name}: embed_dim must be a multiple of num_heads = {num_heads}, found {embed_dim}")
        dropout = checks.check_number(name, "dropout", dropout)
        if not 0 <= dropout <= 1:
            raise ValueError(f"{name}: dropout must lie in [0, 1], found {dropout}")
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.batch_first, self.backend = dropout, batch_first, backend
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        together = self.kdim == self.vdim == embed_dim
        shapes: dict[str, tuple[int, ...] | None] = {
            "in_proj_weight": (3 * embed_dim, embed_dim) if together else None,
            "q_proj_weight": None if together else (embed_dim, embed_dim),
            "k_proj_weight": None if together else (embed_dim, self.kdim),
            "v_proj_weight": None if together else (embed_dim, self.vdim),
            "in_proj_bias": (3 * embed_dim,) if bias else None,
        }
        for parameter, shape in shapes.items():
            value = None if shape is None else nn.Parameter(torch.empty(shape, **place))
            self.register_parameter(parameter, value)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **place)
        self._reset_projections()

    def _reset_projections(self) -> None:
        for parameter in PARAMETERS[:-1]:
            if (weight := getattr(self, parameter)) is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as `torch.nn.MultiheadAttention` does."""
        self.out_proj.reset_parameters()
        self._reset_projections()

    def extra_repr(self) -> str:
        """Sizes, as the module's `repr` shows them."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"


# What has these parameters: our modules and PyTorch's own.
Attention = Union[AttentionModule, nn.MultiheadAttention]
_Module = TypeVar("_Module", bound=AttentionModule)


# ---------------------------------------------------------------- projections


def _weights(attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
    if attention.in_proj_weight is not None:
        query, key, value = attention.in_proj_weight.chunk(3)
        return query, key, value
    found = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    assert found[0] is not None
    assert found[1] is not None
    assert found[2] is not None
    return found[0], found[1], found[2]


def weight_and_bias(attention: Attention, which: int) -> tuple[Tensor, Tensor | None]:
    """Weight `[E, width]` and bias `[E]` of the query's (0), the key's (1) or the value's (2) projection."""
    bias = attention.in_proj_bias
    return _weights(attention)[which], None if bias is None else bias.chunk(3)[which]


def split_heads(attention: Attention, x: Tensor) -> Tensor:
    """`[..., E]` to `[..., H, D]`."""
    return x.view(*x.shape[:-1], attention.num_heads, attention.head_dim)


def project_query(attention: Attention, query: Tensor) -> Tensor:
    """`[..., E]` to heads `[..., H, D]`."""
    return split_heads(attention, F.linear(query, *weight_and_bias(attention, 0)))


def project_keys(attention: Attention, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """`key [T, kdim]`, `value [T, vdim]` to heads `[T, H, D]` each; in one product where they are one tensor."""
    if key is value and attention.in_proj_weight is not None:
        width, bias = attention.embed_dim, attention.in_proj_bias
        both = F.linear(key, attention.in_proj_weight[width:], None if bias is None else bias[width:])
        return split_heads(attention, both[:, :width]), split_heads(attention, both[:, width:])
    k, v = (F.linear(x, *weight_and_bias(attention, i)) for i, x in ((1, key), (2, value)))
    return split_heads(attention, k), split_heads(attention, v)


def project_self(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x [T, E]` to heads of queries, keys and values, `[T, H, D]` each, in one product."""
    if attention.in_proj_weight is None:
        return (project_query(attention, x), *project_keys(attention, x, x))
    packed = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (split_heads(attention, part) for part in packed.chunk(3, -1))
    return q, k, v


def merge_rows(x: Tensor) -> Tensor:
    """`x [B, M, ...]` as `[B*M, ...]`; what is traced has the rows of each `m` together, which `split_rows` knows.

    `flatten` asks whether B is 1, and a traced program would then refuse a single row; joining pieces asks nothing.
    """
    if not torch.compiler.is_compiling():
        return x.flatten(0, 1)
    return torch.cat(x.unbind(1))


def split_rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows that `merge_rows` made, back as `[B, M, ...]`, of which `shape` is the beginning."""
    if not torch.compiler.is_compiling():
        return x.view(*shape, *x.shape[1:])
    return torch.stack([x.narrow(0, m * shape[0], shape[0]) for m in range(shape[1])], 1)


def project_out(attention: Attention, attn_out: Tensor) -> Tensor:
    """Heads `[..., H, D]` to `[..., E]`. As in PyTorch, `out_proj` lends its parameters and is not called."""
    return F.linear(attn_out.flatten(-2), attention.out_proj.weight, attention.out_proj.bias)


# ---------------------------------------------------------------- the ops, and dropout's way round them


def alone(found: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """What an op returns that was not asked for its log-sum-exp, which its type does not say."""
    assert isinstance(found, Tensor)
    return found


def drops(module: nn.Module, dropout: float) -> bool:
    """Whether this call drops attention weights; says once that the reference then takes the kernels' place."""
    if not (module.training and dropout):
        return False
    say_once(
        f"{type(module).__name__}: dropout = {dropout} in training: the reference (eager PyTorch) computes the "
        "attention, for the kernels drop no attention weights; with dropout=0 or in eval() they serve"
    )
    return True


def attend_dropping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    dropout: float,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    num_prefix: int = 0,
) -> Tensor:
    """Softmax attention of packed `q [Tq, H, D]` over `k`, `v [Tk, H, D]` with dropped weights: `[Tq, H, D]`."""
    if q.is_meta:  # the reference reads lengths; the op knows the shapes
        return alone(gated_cross_attention(q, k, v, kv_offsets, q_offsets=q_offsets))
    spans = reference.row_spans(q_offsets, q.shape[0]), reference.row_spans(kv_offsets, k.shape[0])
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    masks = causal, window, num_prefix
    return reference.attend_rows(
        q, spans[0], k, v, spans[1], reference.Maps(factor, "softmax"), reference.Masks(*masks), dropout
    )[0]


def check_call(op: str, need_weights: object, attn_mask: object, is_causal: object, causal: bool) -> None:
    """The arguments of PyTorch's call that are served by what they are at rest, or not at all."""
    checks.check_bool(op, "need_weights", need_weights)
    checks.check_bool(op, "is_causal", is_causal)
    if need_weights:
        wanted = "need_weights must be False, for the ops return no attention weights, and the output comes alone"
        raise ValueError(f"{op}: {wanted}; found True")
    if attn_mask is not None:
        wanted = "attn_mask must be None (masks are told to the constructor, padding by key_padding_mask)"
        raise ValueError(f"{op}: {wanted}, found {checks.describe(attn_mask)}")
    if is_causal and not causal:
        raise ValueError(f"{op}: is_causal must be what the module is, False; found True")


# ---------------------------------------------------------------- to and from PyTorch's module


def adopt(module: _Module, source: Attention) -> _Module:
    """Give `module` the very parameters of `source` (they are shared, not copied) and its mode."""
    _share(module, source)
    module.train(source.training)
    return module


def _share(target: Attention, source: Attention) -> None:
    for name in PARAMETERS:
        setattr(target, name, getattr(source, name))
    target.out_proj.weight, target.out_proj.bias = source.out_proj.weight, source.out_proj.bias


def check_torch(op: str, module: object) -> nn.MultiheadAttention:
    """A `torch.nn.MultiheadAttention` whose every parameter has a counterpart here."""
    if not isinstance(module, nn.MultiheadAttention):
        raise TypeError(f"{op}.from_torch: module must be a torch.nn.MultiheadAttention, found {type(module).__name__}")
    for option, used in (("add_bias_kv", module.bias_k is not None), ("add_zero_attn", module.add_zero_attn)):
        if used:
            raise ValueError(f"{op}.from_torch: module must have {option}=False, which has no counterpart, found True")
    return module


def torch_arguments(module: nn.MultiheadAttention) -> dict[str, Any]:
    """The constructor arguments that the modules share with PyTorch's; on `meta`, since parameters are adopted."""
    names = ("embed_dim", "num_heads", "dropout", "batch_first")
    found = {name: getattr(module, name) for name in names}
    return {**found, "bias": module.in_proj_bias is not None, "device": "meta"}


def as_torch(module: AttentionModule) -> nn.MultiheadAttention:
    """A `torch.nn.MultiheadAttention` with the very parameters of `module`."""
    found = nn.MultiheadAttention(
        module.embed_dim,
        module.num_heads,
        module.dropout,
        bias=module.in_proj_bias is not None,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=module.batch_first,
        device="meta",
    )
    _share(found, module)
    return found.train(module.training)
