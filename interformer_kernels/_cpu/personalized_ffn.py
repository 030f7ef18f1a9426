"""Personalised feed-forward on the native module: see `csrc/cpu/personalized_ffn.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._launch.personalized_ffn import FfnCall, FfnGradients, launcher
from interformer_kernels._launch.tensors import resolved


def _write(call: FfnCall, residual: Tensor | None, out: Tensor) -> None:
    _C.personalized_ffn_forward(*call.arguments(resolved), resolved(residual), out, torch.get_num_threads())


def _write_gradients(call: FfnCall, grad_out: Tensor, gradients: FfnGradients) -> None:
    _C.personalized_ffn_backward(*call.arguments(resolved), resolved(grad_out), *gradients, torch.get_num_threads())


forward, backward = launcher(_write, _write_gradients)
