"""A training step of the whole model can be captured in a CUDA graph and replayed on batches of other lengths.

A graph repeats what was started when it was captured: the host must read nothing, and another batch in the same memory
must start the very same operations and kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import fake_triton_driver
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import interformer_kernels as ik

pytest.importorskip("interformer", reason="the environment of another Triton has the kernels alone")
from interformer import InterFormer, InterFormerConfig
from interformer.batch import Batch
from interformer.testing import random_batch, small_schema

DRIVER = fake_triton_driver.install("sm_90")
# Few long rows, many short ones, none with events; the model has attention, pooling and a personalised feed-forward.
LENGTHS = ((3, 40, 1, 200), (90, 90, 10, 60), (0, 0, 0, 0))
CONFIG = {"embed_dim": 32, "num_heads": 2, "num_layers": 1, "pffn_hidden": (8,), "head_hidden": (8,)}
CAPACITY = 256
_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def described(x: Any) -> Any:
    """An argument with a tensor's place in memory by its form alone."""
    return (x.shape, x.stride(), x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x


class Recorded(TorchDispatchMode):
    """Lists operations and launches by all that a graph keeps of them, and refuses what cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []

    def __enter__(self) -> Any:
        DRIVER.watch = self.launched
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        DRIVER.watch = None
        super().__exit__(*raised)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in function.tags for tag in _READS):
            raise RuntimeError(f"{function} reads contents on the host")
        if function.namespace != "profiler":
            self.steps.append((str(function), str(tree_map(described, (args, kwargs)))))
        return function(*args, **(kwargs or {}))

    def launched(self, metadata: Any, arguments: tuple[Any, ...]) -> None:
        """A kernel: its code, grid and arguments; memory beside its arguments would be allocated outside torch."""
        assert not metadata.global_scratch_size
        assert not metadata.profile_scratch_size
        self.steps.append((metadata.hash, arguments[:3], str(tree_map(described, arguments[9:]))))


def training(read: Callable[..., Any] | None = None) -> tuple[Callable[[], Any], Batch]:
    """A step on memory for 256 events of 4 rows, and that memory."""
    torch.manual_seed(0)
    model = InterFormer(InterFormerConfig(**CONFIG, backend="triton"), small_schema()).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, capturable=True)
    static = random_batch(model.schema, LENGTHS[0]).with_capacity(CAPACITY)

    def run() -> None:
        loss = F.binary_cross_entropy_with_logits(model(static), static.label.bfloat16())
        if read is not None:
            read(loss)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run, static


@pytest.fixture(autouse=True)
def as_on_a_gpu() -> None:
    """Offsets are trusted there."""
    ik.set_validation("off")


@pytest.mark.timeout(900)
def test_a_step_is_the_same_for_all_lengths() -> None:
    run, static = training()
    for _ in range(2):  # compile and bind every kernel, as before a capture
        run()
    captured: list[Any] = []
    for seed, lengths in enumerate(LENGTHS):
        static.copy_(random_batch(small_schema(), lengths, seed))
        with Recorded() as recorded:
            run()
        captured = captured or recorded.steps
        assert len(recorded.steps) == len(captured)
        for found, wanted in zip(recorded.steps, captured, strict=True):
            assert found == wanted
    assert sum(len(step) == 3 for step in captured) > 10  # launches


@pytest.mark.parametrize("read", [Tensor.item, bool, torch.nonzero], ids=["item", "bool", "nonzero"])
def test_a_step_that_reads_is_refused(read: Callable[[Tensor], Any]) -> None:
    run, _ = training(read)
    with pytest.raises(RuntimeError, match="reads contents"), Recorded():
        run()


def test_launches_that_follow_the_lengths_are_not_the_same() -> None:
    """A call with a plan starts fewer programs, which a graph must not repeat: captured calls use none."""
    x, offsets = torch.randn(CAPACITY, 2, 16, dtype=torch.bfloat16), torch.tensor([0, 3, 43, 44, 244])
    launches = []
    for plan in (contextlib.nullcontext, lambda: ik.plan(offsets)):
        with plan(), Recorded() as recorded:
            ik.jagged_attention(x, x, x, offsets, backend="triton")
        launches.append([step for step in recorded.steps if len(step) == 3])
    assert launches[0] != launches[1]
