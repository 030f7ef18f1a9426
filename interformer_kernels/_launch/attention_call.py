"""One call of the attention family, as every backend's kernels take it: the three ops differ in what they leave out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from interformer_kernels._launch.tensors import expanded, readable, resolved


class AttentionCall(NamedTuple):
    """What both directions read; the native module reads it in this order.

    Options that an op does not have keep their neutral values. `layout` says where a row's queries are: "packed"
    `[Tq, H, D]`, "dense" `[B, N, H, D]`, "shared" `[M, H, D]`.
    """

    layout: str
    q: Tensor
    k: Tensor
    v: Tensor | None
    q_offsets: Tensor | None
    kv_offsets: Tensor
    gate: Tensor | None
    scale: float
    score: str
    post_scale: float
    gate_form: str
    gate_activation: str
    skip_prefix: int = 0
    cos: Tensor | None = None
    sin: Tensor | None = None
    positions_q: Tensor | None = None
    positions_k: Tensor | None = None
    rope_interleaved: bool = False
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    num_prefix: int = 0

    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        channels = (self.k if self.v is None else self.v).shape[2]
        rows = (self.kv_offsets.shape[0] - 1,) if self.layout == "shared" else ()
        return (*rows, *self.q.shape[:-1], channels)

    def fitted(self, shape: tuple[int, ...]) -> AttentionCall:
        """The call with its tensors as the kernels read them, and the gate of the output's `shape` by strides of 0."""
        q, gate = resolved(self.q), expanded(self.gate, shape)
        k, v, cos, sin = readable(self.k), readable(self.v), readable(self.cos), readable(self.sin)
        if q is self.q and k is self.k and v is self.v and gate is self.gate and cos is self.cos and sin is self.sin:
            return self
        return self._replace(q=q, k=k, v=v, gate=gate, cos=cos, sin=sin)


class AttentionKernels(Protocol):
    """What a backend brings for the attention family."""

    def forward(
        self, call: AttentionCall, residual: Tensor | None, keep_attn_out: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(out, lse, attn_out)`; `lse` is empty without softmax, `attn_out` unless it is to be kept."""

    def backward(
        self, call: AttentionCall, grad_out: Tensor, attn_out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of `q, k, v, gate`; an input that was not given has an empty one."""
