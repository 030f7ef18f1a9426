"""The models that are measured side by side: one set of parameters, several implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from interformer import InterFormer
from interformer.batch import Batch
from interformer.train import TrainConfig, make_optimizer
from interformer_bench.model.cases import CONFIG, SCHEMA, TRAINING, Case
from interformer_bench.model.padded import PaddedInterFormer, padded
from torch import nn

OURS, COMPILED, REFERENCE = "interformer", "interformer, compiled", "reference"
PADDED, PADDED_COMPILED = "padded SDPA", "padded SDPA, compiled"
_ALL, _COMPILED = (OURS, COMPILED, REFERENCE, PADDED, PADDED_COMPILED), (COMPILED, PADDED_COMPILED)
# Tokens of a padded batch that fit into this machine's memory, in training and in inference.
_MAX_TOKENS = {True: 400_000, False: 2_000_000}


class Contender(NamedTuple):
    """The model as it is called, the module whose parameters it has, and the batch in the model's form."""

    call: Callable[[Batch], torch.Tensor]
    model: nn.Module
    batch: Batch


@functools.cache
def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    return InterFormer(CONFIG, SCHEMA).state_dict()


def contenders(compile_too: bool) -> tuple[str, ...]:
    """Names of the contenders, ours first."""
    return tuple(name for name in _ALL if compile_too or name not in _COMPILED)


def unsupported_reason(name: str, case: Case) -> str | None:
    """The reason why a contender is not measured on the case; None where it is."""
    lengths = case.lengths()
    tokens, max_tokens = len(lengths) * max(lengths), _MAX_TOKENS[case.direction == TRAINING]
    if name in (PADDED, PADDED_COMPILED) and tokens > max_tokens:
        return f"would pad to {tokens} tokens, which memory does not hold"
    return None


def make(name: str, batch: Batch) -> Contender:
    """The contender of this name with the common parameters, and the batch in its form.

    Padded models are compiled for the batch's own sizes, which suits them best; ours for any sizes. Both run on any
    number of threads.
    """
    if name in (PADDED, PADDED_COMPILED):
        lengths = batch.offsets.diff()
        model: nn.Module = PaddedInterFormer(CONFIG, SCHEMA, full=bool((lengths == lengths[0]).all()))
        batch = padded(batch)
    else:
        model = InterFormer(replace(CONFIG, backend="reference" if name == REFERENCE else None), SCHEMA)
    model.load_state_dict(_state())
    if name in _COMPILED:
        options = {"cpp.dynamic_threads": True}
        return Contender(torch.compile(model, fullgraph=True, dynamic=name == COMPILED, options=options), model, batch)
    return Contender(model, model, batch)


def runner(contender: Contender, direction: str) -> Callable[[], torch.Tensor]:
    """A training step (forward, loss, backward, AdamW), or the logits without gradients."""
    call, model, batch = contender
    if direction != TRAINING:
        model.eval()
        return torch.no_grad()(lambda: call(batch))
    optimizer = make_optimizer(model, TrainConfig())

    def step() -> torch.Tensor:
        loss = F.binary_cross_entropy_with_logits(call(batch), batch.label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    return step
