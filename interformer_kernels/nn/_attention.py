"""Shared by the attention modules: the parameters of `torch.nn.MultiheadAttention`, and dropout of weights."""

from __future__ import annotations

from typing import Any, TypeVar, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interformer_kernels import _checks as checks

PARAMETERS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


class AttentionModule(nn.Module):
    """Projections with the names, shapes and initialisation of `torch.nn.MultiheadAttention`: state dicts fit both.

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
        checked_sizes: Any = (
            None if size is None and argument in ("kdim", "vdim") else checks.check_count(name, argument, size, least=1)
            for argument, size in sizes.items()
        )
        embed_dim, num_heads, kdim, vdim = checked_sizes
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
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        one_matrix = self.kdim == self.vdim == embed_dim
        shapes: dict[str, tuple[int, ...] | None] = {
            "in_proj_weight": (3 * embed_dim, embed_dim) if one_matrix else None,
            "q_proj_weight": None if one_matrix else (embed_dim, embed_dim),
            "k_proj_weight": None if one_matrix else (embed_dim, self.kdim),
            "v_proj_weight": None if one_matrix else (embed_dim, self.vdim),
            "in_proj_bias": (3 * embed_dim,) if bias else None,
        }
        for parameter, shape in shapes.items():
            value = None if shape is None else nn.Parameter(torch.empty(shape, **factory_kwargs))
            self.register_parameter(parameter, value)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory_kwargs)
        self._reset_projections()

    def _reset_projections(self) -> None:
        for parameter in PARAMETERS[:-1]:
            if (weight := getattr(self, parameter)) is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def reset_parameters(self) -> None:
        """Initialise all parameters again, as `torch.nn.MultiheadAttention` does."""
        self.out_proj.reset_parameters()
        self._reset_projections()

    def extra_repr(self) -> str:
        """The sizes shown by the module's `repr`."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"


# A module with these parameters: one of this package or PyTorch's own.
Attention = Union[AttentionModule, nn.MultiheadAttention]
_Module = TypeVar("_Module", bound=AttentionModule)


# ---------------------------------------------------------------- projections


def _weights(attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
    if attention.in_proj_weight is not None:
        query, key, value = attention.in_proj_weight.chunk(3)
        return query, key, value
    q_weight, k_weight, v_weight = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    assert q_weight is not None
    assert k_weight is not None
    assert v_weight is not None
    return q_weight, k_weight, v_weight


def weight_and_bias(attention: Attention, index: int) -> tuple[Tensor, Tensor | None]:
    """Weight `[E, width]` and bias `[E]` of the query (0), key (1) or value (2) projection."""
    bias = attention.in_proj_bias
    return _weights(attention)[index], None if bias is None else bias.chunk(3)[index]


def split_heads(attention: Attention, x: Tensor) -> Tensor:
    """`[..., E]` to `[..., H, D]`."""
    return x.view(*x.shape[:-1], attention.num_heads, attention.head_dim)


def project_query(attention: Attention, query: Tensor) -> Tensor:
    """`[..., E]` to heads `[..., H, D]`."""
    return split_heads(attention, F.linear(query, *weight_and_bias(attention, 0)))


def project_keys(attention: Attention, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """`key [T, kdim]`, `value [T, vdim]` to heads `[T, H, D]` each; one product if both are the same tensor."""
    if key is value and attention.in_proj_weight is not None:
        width, bias = attention.embed_dim, attention.in_proj_bias
        kv = F.linear(key, attention.in_proj_weight[width:], None if bias is None else bias[width:])
        return split_heads(attention, kv[:, :width]), split_heads(attention, kv[:, width:])
    k, v = (F.linear(x, *weight_and_bias(attention, i)) for i, x in ((1, key), (2, value)))
    return split_heads(attention, k), split_heads(attention, v)


def project_self(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x [T, E]` to heads of queries, keys and values, `[T, H, D]` each, in one product."""
    if attention.in_proj_weight is None:
        return (project_query(attention, x), *project_keys(attention, x, x))
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.view(x.shape[0], 3, attention.num_heads, attention.head_dim).unbind(1)
    return q, k, v


def project_out(attention: Attention, attn_out: Tensor) -> Tensor:
    """Heads `[..., H, D]` to `[..., E]`. As in PyTorch, `out_proj` is not called: only its parameters are used."""
    return F.linear(attn_out.flatten(-2), attention.out_proj.weight, attention.out_proj.bias)


# ---------------------------------------------------------------- calls of the ops


def output_only(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The result of an op called without `return_lse`, narrowed to a tensor for type checkers."""
    assert isinstance(result, Tensor)
    return result


def dropout_options(dropout: float, device: torch.device) -> dict[str, Any]:
    """The ops' arguments for a call that drops attention weights with this probability; none for 0.

    The seed comes from torch's generator of the device: `torch.manual_seed` and checkpointing reproduce it.
    """
    if not dropout:
        return {}
    return {"dropout_p": dropout, "dropout_seed": torch.randint(2**62, (), device=device)}


def check_call(op: str, need_weights: object, attn_mask: object, is_causal: object, causal: bool) -> None:
    """Refuse arguments of PyTorch's call that differ from their neutral values, which alone are supported."""
    checks.check_bool(op, "need_weights", need_weights)
    checks.check_bool(op, "is_causal", is_causal)
    if need_weights:
        expected = "need_weights must be False, because the ops return no attention weights"
        raise ValueError(f"{op}: {expected}; found True")
    if attn_mask is not None:
        expected = "attn_mask must be None (masks are set in the constructor, padding by key_padding_mask)"
        raise ValueError(f"{op}: {expected}, found {checks.describe(attn_mask)}")
    if is_causal and not causal:
        raise ValueError(f"{op}: is_causal must be False, as in the constructor; found True")


# ---------------------------------------------------------------- to and from PyTorch's module


def adopt(module: _Module, source: Attention) -> _Module:
    """Make `module` share the parameters of `source` (not copies of them), and take over its training mode."""
    _share(module, source)
    module.train(source.training)
    return module


def _share(target: Attention, source: Attention) -> None:
    for name in PARAMETERS:
        setattr(target, name, getattr(source, name))
    target.out_proj.weight, target.out_proj.bias = source.out_proj.weight, source.out_proj.bias


def check_convertible(op: str, module: object) -> nn.MultiheadAttention:
    """`module`, if it is a `torch.nn.MultiheadAttention` whose every parameter has a counterpart here."""
    if not isinstance(module, nn.MultiheadAttention):
        raise TypeError(f"{op}.from_torch: module must be a torch.nn.MultiheadAttention, found {type(module).__name__}")
    for option, used in (("add_bias_kv", module.bias_k is not None), ("add_zero_attn", module.add_zero_attn)):
        if used:
            raise ValueError(f"{op}.from_torch: module must have {option}=False (True is not supported), found True")
    return module


def torch_arguments(module: nn.MultiheadAttention) -> dict[str, Any]:
    """The constructor arguments shared with PyTorch's module; on `meta`, since its parameters are taken over."""
    names = ("embed_dim", "num_heads", "dropout", "batch_first")
    arguments = {name: getattr(module, name) for name in names}
    return {**arguments, "bias": module.in_proj_bias is not None, "device": "meta"}


def as_torch(module: AttentionModule) -> nn.MultiheadAttention:
    """A `torch.nn.MultiheadAttention` that shares the parameters of `module`."""
    converted = nn.MultiheadAttention(
        module.embed_dim,
        module.num_heads,
        module.dropout,
        bias=module.in_proj_bias is not None,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=module.batch_first,
        device="meta",
    )
    _share(converted, module)
    return converted.train(module.training)
