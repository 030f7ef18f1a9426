"""A whole training step of InterFormer in a CUDA graph: replays on batches of other lengths are right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from interformer import InterFormer, InterFormerConfig
from interformer.batch import Batch
from interformer.testing import random_batch, small_schema
from interformer_bench.check_context import (
    DTYPES,
    CheckContext,
    Finding,
    Results,
    dtype_name,
    random_lengths,
    within_budget,
)
from interformer_bench.gpu_place import capture_graph
from torch import Tensor

OP = "interformer"  # stands where other checks name an op
_CONFIG = {tiny: InterFormerConfig(num_layers=1 if tiny else 3, max_history=256) for tiny in (True, False)}
# Rows, and the longest of the shortest and of the longest batch.
_ROWS, _LONGEST = {True: 4, False: 64}, {True: (4, 12), False: (60, 200)}


def batches(context: CheckContext) -> list[Batch]:
    """Batches of as many rows and of different lengths, the shortest last."""
    short, long = _LONGEST[context.place.tiny]
    lengths = [
        random_lengths(_ROWS[context.place.tiny], 0, longest, seed) for seed, longest in enumerate((long, long, short))
    ]
    return [random_batch(small_schema(), each, seed).to(context.place.device) for seed, each in enumerate(lengths)]


def graph_step(context: CheckContext) -> Iterator[Finding]:
    """Forward, loss, backward and AdamW, captured on one batch and replayed on others: gradients against float64."""
    for dtype in DTYPES:
        torch.manual_seed(0)
        config = _CONFIG[context.place.tiny]
        model = InterFormer(replace(config, backend=context.place.backend(context.backend)), small_schema())
        model.to(context.place.device, dtype)
        contents = batches(context)
        static = contents[0].with_capacity(max(len(batch.sequences) for batch in contents) + 3)
        run, _ = capture_graph(training_step(model, static), context.place)
        for number in (1, 2, 0):
            before = copy.deepcopy(model.state_dict())
            static.copy_(contents[number])
            run()
            eager, truth = (_reference(config, before, contents[number], kind) for kind in (dtype, torch.float64))
            yield within_budget(f"replay on batch {number}", dtype, gradients(model), eager, truth)
            changed = any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
            problem = None if changed else "the optimizer left all parameters as they were"
            yield Finding(f"replay on batch {number} trains", dtype_name(dtype), changed, problem)


def training_step(model: InterFormer, batch: Batch) -> Callable[[], Tensor]:
    """One step on what the batch holds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def step() -> Tensor:
        loss = _loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _loss(model: InterFormer, batch: Batch) -> Tensor:
    logits = model(batch)
    return F.binary_cross_entropy_with_logits(logits, batch.label.to(logits.dtype))


def gradients(model: InterFormer) -> Results:
    """The gradient of every parameter, by its name."""
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def _reference(config: InterFormerConfig, state: dict[str, Tensor], batch: Batch, dtype: torch.dtype) -> Results:
    """Gradients of the definition, of the same parameters in `dtype`."""
    model = InterFormer(replace(config, backend="reference"), small_schema()).to(batch.label.device, dtype)
    model.load_state_dict(state)
    _loss(model, batch).backward()
    return gradients(model)
