"""The models that are measured side by side: one set of parameters, several implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from interformer import InterFormer
from interformer.batch import Batch
from interformer.train import TrainConfig, make_optimizer
from interformer_bench.model.by_length import ByLengthInterFormer, bucketed, grouped
from interformer_bench.model.cases import CONFIG, SCHEMA, TRAINING, Case
from interformer_bench.model.padded import PaddedInterFormer, padded
from torch import nn

OURS, COMPILED, REFERENCE = "interformer", "interformer, compiled", "reference"
PADDED, PADDED_COMPILED = "padded SDPA", "padded SDPA, compiled"
BY_LENGTH, BY_LENGTH_COMPILED = "padded by length", "padded by length, compiled"
# The fastest of these is what ours is held against.
PEERS = (PADDED, PADDED_COMPILED, BY_LENGTH, BY_LENGTH_COMPILED)
# In this order, since padding to the longest row is tried only where it may be faster than by length.
_ALL = (OURS, COMPILED, BY_LENGTH, BY_LENGTH_COMPILED, PADDED, PADDED_COMPILED, REFERENCE)
COMPILED_MODELS = frozenset({COMPILED, BY_LENGTH_COMPILED, PADDED_COMPILED})
# Tokens of a padded batch that fit into this machine's memory, in training and in inference.
_MAX_TOKENS = {True: 400_000, False: 2_000_000}


class Contender(NamedTuple):
    """The model as it is called, the module whose parameters it has, and the batch in the model's form."""

    call: Callable[[Any], torch.Tensor]
    model: nn.Module
    batch: Any


@functools.cache
def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    return InterFormer(CONFIG, SCHEMA).state_dict()


def contenders(compile_too: bool) -> tuple[str, ...]:
    """Names of the contenders, ours first."""
    return tuple(name for name in _ALL if compile_too or name not in COMPILED_MODELS)


def padded_tokens(name: str, lengths: Sequence[int]) -> int:
    """Events that the contender computes for rows of these lengths, padding included."""
    if name in (PADDED, PADDED_COMPILED):
        return len(lengths) * max(lengths)
    if name in (BY_LENGTH, BY_LENGTH_COMPILED):
        groups = grouped(lengths, CONFIG.num_cls)
        return sum(len(group) * max(lengths[row] for row in group) for group in groups)
    return sum(lengths)


def unsupported_reason(name: str, case: Case) -> str | None:
    """The reason why a contender is not measured on the case; None where it is."""
    lengths = case.lengths()
    tokens, max_tokens = padded_tokens(name, lengths), _MAX_TOKENS[case.direction == TRAINING]
    if name in PEERS and tokens > max_tokens:
        return f"would pad to {tokens} tokens, which memory does not hold"
    if name in (BY_LENGTH, BY_LENGTH_COMPILED) and len(grouped(lengths, CONFIG.num_cls)) == 1:
        return "has one bucket: it is the padded model"
    return None


def make(name: str, batch: Batch) -> Contender:
    """The contender of this name with the common parameters, and the batch in its form.

    Padded models are compiled for the batch's own sizes, which suits them best; ours, and a bucket, for any sizes. All
    run on any number of threads.
    """
    form: Any = batch
    if name in (PADDED, PADDED_COMPILED):
        lengths = batch.offsets.diff()
        model: nn.Module = PaddedInterFormer(CONFIG, SCHEMA, full=bool((lengths == lengths[0]).all()))
        form = padded(batch)
    elif name in (BY_LENGTH, BY_LENGTH_COMPILED):
        model, form = ByLengthInterFormer(CONFIG, SCHEMA), bucketed(batch, CONFIG.num_cls)
    else:
        model = InterFormer(replace(CONFIG, backend="reference" if name == REFERENCE else None), SCHEMA)
    model.load_state_dict(_state())
    if name == BY_LENGTH_COMPILED:
        model.both_sides = _compiled(model.both_sides, dynamic=True)
    elif name in COMPILED_MODELS:
        return Contender(_compiled(model, dynamic=name == COMPILED), model, form)
    return Contender(model, model, form)


def _compiled(function: Callable[..., torch.Tensor], dynamic: bool) -> Callable[..., torch.Tensor]:
    options = {"cpp.dynamic_threads": True}
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)


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
