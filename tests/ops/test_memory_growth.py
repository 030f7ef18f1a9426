"""Memory of every op of the CPU kernels against the length of the rows: linear, for one thread and for two.

A process of its own for each number of threads, since a peak is the process's: `bench/memory.py` says how it is read.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interformer_bench import memory
from torch import Tensor

from interformer_kernels import testing
from interformer_kernels.testing import Case

pytest.importorskip("interformer_kernels._C", exc_type=ImportError)
pytestmark = pytest.mark.skipif(memory.unsupported_reason() is not None, reason=str(memory.unsupported_reason()))

MIB = 1 << 20
WINDOW: dict[str, Any] = {"window": (64, 64)}
# A call's bound at its peak, outputs and gradients included: so many times the bytes of its inputs in float32 (on
# two threads each packs keys and values and sums their gradients), and what does not grow with the length.
TIMES, FIXED = 5, 4 * MIB


def one_row(length: int) -> dict[str, Any]:
    return {"lengths": (length,), "tail": 0}


def many_rows(length: int) -> dict[str, Any]:
    return {"lengths": (*(40,) * (length // 80), length // 2), "tail": 0}


# A name, how rows grow, the shortest length, and the rest of the case.
PACKED: dict[str, Any] = {"op": "jagged_attention", "heads": 1, "kv_heads": 1, "head_size": 64, "value_size": 64}
GROWING: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "window": (one_row, 2000, {**PACKED, "options": WINDOW}),
    "window, prefix": (one_row, 2000, {**PACKED, "options": {**WINDOW, "num_prefix": 4}}),
    "window, heads": (one_row, 1000, {**PACKED, "heads": 8, "kv_heads": 4, "head_size": 16, "options": WINDOW}),
    "window, rotary, gate": (one_row, 2000, {**PACKED, "rope": 64, "gate": "full", "options": WINDOW}),
    "window, gate per head": (one_row, 2000, {**PACKED, "gate": "head", "options": WINDOW}),
    "window, one gate": (many_rows, 2000, {**PACKED, "gate": "channel", "options": WINDOW}),
    "window, pointwise": (one_row, 2000, {**PACKED, "options": {**WINDOW, "score": "relu"}}),
    "all keys": (one_row, 1000, {**PACKED, "head_size": 32, "value_size": 32}),
    "causal, wide heads": (one_row, 1000, {**PACKED, "head_size": 128, "value_size": 256, "options": {"causal": True}}),
    "many rows": (many_rows, 2000, {**PACKED, "heads": 4, "kv_heads": 2, "head_size": 16}),
    "pooling": (one_row, 4000, {**PACKED, "op": "pma_pooling"}),
    "pooling, gate": (many_rows, 4000, {**PACKED, "op": "pma_pooling", "queries": 4, "gate": "channel"}),
    "dense": (one_row, 4000, {**PACKED, "op": "gated_cross_attention", "queries": 4, "gate": "full"}),
    "feed-forward": (one_row, 4000, {"op": "personalized_ffn", "head_size": 64, "value_size": 64, "residual": True}),
    "feed-forward, many rows": (many_rows, 4000, {"op": "personalized_ffn", "head_size": 16, "value_size": 16}),
    "rotary": (one_row, 4000, {"op": "apply_rotary", "rope": 32, "head_size": 64}),
}


def case_of(name: str, times: int) -> Case:
    rows, shortest, rest = GROWING[name]
    rest = {key: x for key, x in rest.items() if key != "op"}
    return Case(GROWING[name][2]["op"], name, **rows(shortest * times), **rest)


def child() -> None:
    """Prints the bytes of the inputs in float32 and the growth at the peak, by length, of each case, dtype and pass."""
    found = {}
    for name in GROWING:
        for dtype in (torch.float32, torch.bfloat16):
            made = [testing.make_inputs(case_of(name, n), dtype) for n in (1, 2, 4)]
            for half in ("forward", "backward"):
                _run(case_of(name, 1), half, made[0])  # code and threads are loaded
                peaks = [memory.growth(functools.partial(_run, case_of(name, 1), half, x))[0] for x in made]
                sizes = [sum(4 * x.numel() for x in of.values() if isinstance(x, Tensor)) for of in made]
                found[f"{name}, {dtype}, {half}"] = [sizes, peaks]
    print(json.dumps(found))


def _run(case: Case, half: str, inputs: dict[str, Any]) -> object:
    if half == "backward":
        return testing.evaluate(lambda: testing.call(case.op, inputs, "cpu"), case.op, inputs)
    with torch.no_grad():
        return testing.call(case.op, inputs, "cpu")


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_grows_with_the_length(threads: int) -> None:
    """And no faster: what is beyond 1x, 2x and 4x the length is the same for each token, and bounded."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    script = f"import torch, test_memory_growth; torch.set_num_threads({threads}); test_memory_growth.child()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **memory.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 4 * len(GROWING)
    wrong = []
    for name, (sizes, peaks) in found.items():
        bounded = all(peak <= TIMES * size + FIXED for size, peak in zip(sizes, peaks, strict=True))
        # From 2x to 4x twice as much is added as from 1x to 2x, and of a square four times as much. Which thread
        # touches how much of its memory is a matter of luck.
        linear = peaks[2] - peaks[1] <= 3 * max(peaks[1] - peaks[0], 0) + 2 * MIB
        if not bounded or not linear:
            wrong.append(f"{name}: {[size // 1024 for size in sizes]} KiB of inputs, {[p // 1024 for p in peaks]} KiB")
    assert not wrong, "\n".join(wrong)
