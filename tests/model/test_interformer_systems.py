"""The model under PyTorch's systems: compile, copies, saved files, autocast, activation checkpoints, torch.func."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from interformer import InterFormer, InterFormerConfig
from interformer.batch import Batch
from interformer.testing import random_batch, small_schema
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

SCHEMA = small_schema()
CONFIG = InterFormerConfig(
    embed_dim=8, num_heads=2, num_layers=1, interaction_hidden=(12,), pffn_hidden=(6,), head_hidden=(8,), max_history=40
)
LENGTHS = (3, 0, 17, 1)


def small_model() -> InterFormer:
    return InterFormer(CONFIG, SCHEMA).eval()


def batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Batch:
    return random_batch(SCHEMA, lengths, seed=seed)


def loss_of(logits: Tensor, rows: Batch) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, rows.label)


def test_one_graph_serves_batches_of_any_lengths() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = small_model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        lengths = torch.randint(0, 30, (int(torch.randint(2, 9, (), generator=generator)),), generator=generator)
        rows = batch(tuple(lengths.tolist()), seed=step)
        torch.testing.assert_close(compiled(rows), model(rows))
    assert counters["stats"]["unique_graphs"] == 1


def test_gradients_of_the_compiled_model() -> None:
    torch._dynamo.reset()
    model, rows = small_model(), batch()
    expected = torch.autograd.grad(loss_of(model(rows), rows), list(model.parameters()))
    # Like inductor, it decomposes the backward of layer norm, whose fake result has other strides than the real one.
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager_decomp_partition")
    actual = torch.autograd.grad(loss_of(compiled(rows), rows), list(model.parameters()))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "safetensors"])
def test_copies_compute_the_same(way: str, tmp_path: Path) -> None:
    model, rows = small_model(), batch()
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        copied = small_model()
        copied.load_state_dict(torch.load(file, weights_only=True))
    else:
        library = pytest.importorskip("safetensors.torch", reason="needs safetensors")
        library.save_file(model.state_dict(), tmp_path / "model.safetensors")
        copied = small_model()
        copied.load_state_dict(library.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(copied(rows), model(rows))


def test_autocast_trains_in_bfloat16() -> None:
    model, rows = small_model(), batch()
    exact = model(rows)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows)
    torch.testing.assert_close(logits.float(), exact, atol=0.1, rtol=0.1)
    loss_of(logits.float(), rows).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name


def test_checkpointing_gives_the_same_gradients() -> None:
    model, rows = small_model(), batch()
    expected = torch.autograd.grad(loss_of(model(rows), rows), list(model.parameters()))
    logits = checkpoint(model, rows, use_reentrant=False)
    actual = torch.autograd.grad(loss_of(logits, rows), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_gradients_by_torch_func() -> None:
    model, rows = small_model(), batch()
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(model, values, (rows,)), rows)

    actual = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(actual[name], gradient)
