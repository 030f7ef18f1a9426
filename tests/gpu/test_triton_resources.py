"""The Triton kernels compile for every device without one, and fit: no spills, shared memory within the device's.

A part of the table is compiled here, in processes that are not interpreting. `make resources` compiles all of it, and
`.ci/run` has it compile one entry in seven: each call, width, dtype and device comes up in rotation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))
# At least one entry of each kernel, dtype and device. All are among those of `.ci/run`, which then finds them compiled.
PART = (
    "jagged_attention/16/bfloat16/sm_80",
    "jagged_attention/32/float32/sm_90",
    "pma_pooling/64/float16/sm_100",
    "gated_cross_attention/32/float16/gfx942",
    "personalized_ffn/64/bfloat16/sm_90",
    "apply_rotary/64/float16/sm_90",
    "rotary_attention/64/bfloat16/gfx942",
    "own_scores/64/bfloat16/sm_90",
)
KERNELS = {
    "attention_forward", "epilogue_backward", "attention_grad_queries", "attention_grad_keys", "combine_partials",
    "add_partials", "attention_forward_short", "attention_backward_short", "attention_backward_whole", "rotate_rows",
    "row_products", "row_grad_weight", "softmax_rows", "weighted_sums", "weighted_sum_gradients",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """The lines of the table that `make resources` would print for these entries."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "resources.triton_kernels", "--json"]
    command += [word for entry in PART for word in ("--entry", entry)]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert completed.returncode in (0, 1), completed.stderr
    assert "Traceback" not in completed.stderr, completed.stderr  # A traceback ends with status 1, too.
    return [json.loads(line) for line in completed.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_fit_every_device(compiled: list[dict[str, Any]]) -> None:
    assert {usage["target"] for usage in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {usage["kernel"] for usage in compiled} == KERNELS
    assert not [usage for usage in compiled if not usage["fits"]]
    assert all(0 < usage["registers"] <= 512 for usage in compiled)
    for usage in compiled:
        makes_scores = usage["kernel"] in ("attention_forward", "attention_grad_queries", "attention_grad_keys")
        assert (usage["per_score"] > 0) == (makes_scores and usage["target"] != "gfx942"), usage
        assert usage["loop"] >= usage["per_score"]


def test_a_main_loop_that_grows_is_named() -> None:
    from resources import loop_record

    recorded = {"longer": 100, "as long": 100, "shorter": 100}
    assert loop_record.rises({"longer": 111, "as long": 110, "shorter": 90, "new": 500}, recorded) == [
        "longer: the main loop has grown from 100 to 111 instructions"
    ]


def test_what_does_not_fit_is_seen() -> None:
    """A kernel that spills, and one that takes more shared memory than the device has, each fails its line."""
    from resources.triton_kernels import SHARED_MEMORY, Usage

    kernel = "jagged_attention", "attention_forward", 64, "float32", "sm_80", "64x64", 255
    assert Usage(*kernel, 0, SHARED_MEMORY["sm_80"]).fits
    assert not Usage(*kernel, 4, 0).fits
    assert not Usage(*kernel, 0, SHARED_MEMORY["sm_80"] + 1).fits


def test_heads_that_fill_their_tiles_in_part_have_tiles_of_their_own() -> None:
    """In 16 bits on 9.0, where a mask of channels takes registers; full heads, other devices and dtypes keep theirs."""
    from interformer_kernels._triton._attention_geometry import geometry
    from interformer_kernels._triton._tiles import Target, Tiles, forced

    def chosen(d: int, capability: int = 90, itemsize: int = 2) -> list[Any]:
        sizes = "packed", "softmax", False, d, d, 4, 4, 0, itemsize, Target("cuda", capability), "ieee", 0, True
        made = geometry.__wrapped__(0, *sizes, tiled=False, option="")
        kernels = ("forward", "grad_queries", "grad_keys")
        return [*(made.tiles(kernel)[:4] for kernel in kernels), made.short[True] and made.short[True][:4]]

    assert chosen(50) == [(64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (64, 32, 8, 1)]
    assert chosen(100) == [(64, 32, 8, 2), (64, 16, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1)]
    assert chosen(200)[:2] == [(32, 32, 8, 2), (16, 16, 8, 2)]
    assert chosen(128) == [(64, 32, 4, 2), (64, 32, 4, 2), (32, 128, 8, 2), (32, 32, 4, 1)]
    for options in ({"capability": 80}, {"capability": 100}, {"itemsize": 4}):
        assert chosen(100, **options) == chosen(128, **options)
    tuned = Tiles(32, 64, 2, 3)
    with forced("forward/128/16", tuned):
        assert chosen(100)[0] == tuned[:4]
