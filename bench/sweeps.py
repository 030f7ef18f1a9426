"""Time against length, batch and fill: one op each, on shapes that differ in that alone, beside its best peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from interformer_bench import quiet, run, shapes
from interformer_bench.grid import Shape
from interformer_bench.run import Measurement
from interformer_bench.workloads import Sizes


@dataclass(frozen=True)
class Sweep:
    """One op along one axis.

    Attributes:
        axis: the quantity that varies.
        label: the axis in words, with its unit.
        at: the place of a measurement on the axis.
        held: the quantities that are constant, in words.
        shapes: the shapes in the order of the axis.
        peers: the peers beside this package: those that are best somewhere on the axis, and the usual implementation.
    """

    axis: str
    label: str
    at: Callable[[Measurement], float]
    held: str
    shapes: tuple[Shape, ...]
    peers: tuple[str, ...]

    @property
    def op(self) -> str:
        """The op that is swept."""
        return self.shapes[0].op

    def title(self) -> str:
        """The title of picture and table."""
        return f"{self.op} against {self.axis}: {self.shapes[0].sizes}, {self.held}, float32"


_TOKENS = 16384


def _length() -> Sweep:
    sizes = Sizes(heads=4, head_size=32)
    lengths = tuple(Shape("jagged_attention", shapes.equal(n), _TOKENS // n, sizes) for n in (8 << i for i in range(9)))
    peers = "padded SDPA", "per-row SDPA", "torch.compile"
    return Sweep("length", "tokens of each row", lambda m: m.longest, f"{_TOKENS} tokens in all", lengths, peers)


def _batch() -> Sweep:
    sizes = Sizes(heads=4, head_size=32, queries=2)
    batches = tuple(Shape("pma_pooling", shapes.equal(50), 4**i, sizes) for i in range(7))
    peers = "padded SDPA", "eager with mask", "index-add"
    return Sweep("batch", "rows", lambda m: m.rows, "50 tokens a row", batches, peers)


def _fill() -> Sweep:
    sizes = Sizes(heads=4, head_size=32, queries=4, gated=True)
    fills = 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0
    filled = tuple(Shape("gated_cross_attention", shapes.filled(share), 256, sizes) for share in fills)
    peers = "padded SDPA", "per-row SDPA", "eager with mask"
    label = "tokens / places of the padded batch"
    held = "256 rows, the longest of up to 512 tokens"
    return Sweep("fill", label, lambda m: m.tokens / (m.rows * m.longest), held, filled, peers)


SWEEPS = {sweep.axis: sweep for sweep in (_length(), _batch(), _fill())}


def measure(sweep: Sweep, settings: run.Settings, watch: quiet.Watch | None = None) -> Iterator[Measurement]:
    """The measurements of a sweep, in float32 on the largest number of threads."""
    sweep_settings = replace(
        settings,
        dtypes=("float32",),
        threads=(max(settings.threads),),
        peers=sweep.peers,
        stage=f"against {sweep.axis}",
    )
    return run.measure(sweep.shapes, sweep_settings, watch=watch)
