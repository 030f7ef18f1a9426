"""Instructions of the forward's main loop without masks, per tile, as the predictions count it:
`PYTHONPATH=tools python -m resources.plain_loops`, for the Triton that is there. bfloat16, sm_90.

The table of `triton_kernels.py` has calls with a window and a gate, so that nothing is left out of its resources.
"""

from __future__ import annotations

import torch
import triton

from interformer_kernels._calls import AttentionCall
from interformer_kernels._triton import _run, attention
from resources.triton_kernels import LANES, TARGETS, source_of, usage_on_nvidia


def main() -> None:
    """Print a line for each width."""
    device, compiler = TARGETS["sm_90"]
    offsets = torch.empty(129, dtype=torch.int64, device="meta")
    for width in (16, 32, 64, 128, 256):
        x = torch.empty(4096, 4, width, dtype=torch.bfloat16, device="meta")
        with _run.recording(device) as launches:
            attention.forward(AttentionCall("packed", x, x, x, None, offsets), None, True)
        launch = next(launch for launch in launches if launch.kernel.fn.__name__ == "attention_forward")
        tiles = launch.tiles
        compiled = triton.compile(source_of(launch), target=compiler, options=tiles.options)
        registers, spills, loop = usage_on_nvidia(compiled, compiler)
        per_score = loop * tiles.warps * LANES / (tiles.queries * tiles.keys)
        print(
            f"{width:4} channels, {tiles.queries}x{tiles.keys}, {tiles.warps} warps: {loop} instructions, "
            f"{per_score:.1f} a score, {registers} registers, {spills} bytes spilled",
            flush=True,
        )


if __name__ == "__main__":
    main()
