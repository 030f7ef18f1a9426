"""Predicted times of our GPU kernels at the shapes of the plan: predicted, unmeasured.

`PYTHONPATH=tools python -m resources.predict`, or `make predictions`. For each shape the launches are those that the
launchers record. Each kernel is compiled for sm_90, and a thread of some of its programs is walked through the machine
code (`walk.py`), so the counts are those of whole launches. Lower bounds of a launch follow from an H200's limits
(`bounds.py`), and by the same method those of FlashAttention 2 (`rivals.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence

from interformer_kernels._cli.tables import print_table, status_line
from resources import bounds
from resources.bounds import Bounds, bounds_of
from resources.rivals import Device, Rival, rival
from resources.shapes import SHAPES, Shape, record

_DEVICE = Device(bounds.PROCESSORS, bounds.CLOCK, bounds.ISSUE, bounds.MMA_SYNC, bounds.COPY)
DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One pass at one shape, in microseconds: our launches, PyTorch's own operations, and FlashAttention 2."""

    shape: str
    direction: str
    launches: tuple[Bounds, ...]
    others: tuple[str, ...]
    floor: float  # of memory, for inputs and outputs that are moved once
    flops: float  # of the op itself
    rival: Rival | None

    @property
    def bound(self) -> float:
        """The sum of the launches' largest bounds: they run one after another."""
        return sum(launch.bound for launch in self.launches)

    @property
    def expected(self) -> float:
        return sum(launch.expected for launch in self.launches)

    def total(self, name: str) -> float:
        """The sum of one bound over the launches."""
        return sum(float(getattr(launch, name)) for launch in self.launches)

    @property
    def limit(self) -> float:
        """The time that no implementation can beat: useful bytes, or useful products on the fastest tensor cores."""
        return max(self.floor, 1e6 * self.flops / bounds.WGMMA)


def _useful(shape: Shape, direction: str) -> tuple[float, float]:
    """Bytes and FLOPs that the op needs, whoever computes it."""
    tokens, rows = sum(shape.lengths), len(shape.lengths)
    if shape.op == "ffn":
        matrices = rows * shape.width * shape.width
        flops = 2.0 * tokens * shape.width * shape.width
        numbers = 2 * tokens * shape.width + matrices
        return (2.0 * numbers, flops) if direction == "forward" else (2.0 * (1.5 * numbers + matrices), 2 * flops)
    size = shape.heads * shape.width
    queries = [shape.queries or length for length in shape.lengths]
    pairs = sum(n * length for n, length in zip(queries, shape.lengths, strict=True))
    of_queries = shape.queries if shape.op == "pma" else sum(queries)
    read = (of_queries + 2 * tokens) * size
    written = sum(queries) * size
    if direction == "forward":
        return 2.0 * (read + written), 4.0 * pairs * size
    return 2.0 * (2 * read + written), 10.0 * pairs * size


def _rival(shape: Shape, direction: str) -> Rival | None:
    if shape.op == "ffn":
        return None
    rows = [(shape.queries or length, length) for length in shape.lengths]
    moved = sum(2 * queries + 2 * keys for queries, keys in rows)
    return rival(direction, rows, shape.heads, shape.width, moved, _DEVICE)


def _triton_bounds(shape: Shape, training: bool, sample: int) -> tuple[list[Bounds], list[str]]:
    recorded = record(shape, training)
    return [bounds_of(launch, sample) for launch in recorded.launches], recorded.others


def _cuda_bounds(shape: Shape, training: bool, sample: int) -> tuple[list[Bounds], list[str]]:
    from resources import cuda_launches  # builds the emulation, which replaces the CUDA part of this process

    launches, _kept = cuda_launches.record(shape, training)
    return [cuda_launches.bounds_of(launch, sample) for launch in launches], []


def predict(shape: Shape, sample: int, backend: str = "triton") -> Iterator[Prediction]:
    """Both passes; the forward as in inference."""
    of_backend = {"triton": _triton_bounds, "cuda": _cuda_bounds}[backend]
    for direction in DIRECTIONS:
        status_line(f"{shape.name}, {direction}")
        of_launches, others = of_backend(shape, direction == "backward", sample)
        useful = _useful(shape, direction)
        yield Prediction(
            shape.name, direction, tuple(of_launches), tuple(others),
            1e6 * useful[0] / bounds.COPY, useful[1], _rival(shape, direction),
        )  # fmt: skip
    status_line("")


# ---------------------------------------------------------------- tables


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}"


def _show_launches(prediction: Prediction) -> None:
    columns = ("kernel", "programs", "with work", "a processor", "instructions", "issue", "special", "products",
               "memory", "latency", "bound by", "expected")  # fmt: skip
    lines = [
        (
            launch.kernel, str(launch.grid), str(launch.live), str(launch.resident), str(round(launch.instructions)),
            *(_number(getattr(launch, name)) for name in bounds.LIMITS), launch.largest, _number(launch.expected),
        )
        for launch in prediction.launches
    ]  # fmt: skip
    others = f", and PyTorch's {', '.join(prediction.others)}" if prediction.others else ""
    print_table(f"{prediction.shape}, {prediction.direction}, us{others}", columns, lines)


def _show(predictions: Sequence[Prediction]) -> None:
    columns = ("shape", "pass", "launches", "limit", "issue", "special", "products", "memory", "latency", "bound",
               "expected", "of limit", "FA2 bound", "FA2 expected", "FA2 / ours, bounds", "expected")  # fmt: skip
    lines = []
    for one in predictions:
        other = one.rival
        lines.append((
            one.shape, one.direction, f"{len(one.launches)}+{len(one.others)}", _number(one.limit),
            *(_number(one.total(name)) for name in bounds.LIMITS), _number(one.bound), _number(one.expected),
            f"{one.limit / one.expected:.0%}",
            *(("-",) * 4 if other is None else (
                _number(other.bound), _number(other.expected), f"{other.bound / one.bound:.2f}",
                f"{other.expected / one.expected:.2f}",
            )),
        ))  # fmt: skip
    print_table("Predicted, unmeasured: bfloat16 on an H200, us", columns, lines)
    print(
        "Launches: ours + PyTorch's own. The limit: useful bytes at the speed of a copy, or useful products by wgmma.\n"
        "Expected: issue, products and special functions at the share that FlashAttention 2 reaches of its own bound."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the bounds of all launches of the chosen shapes, and a table of the shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", default=[], help="a part of the names of shapes; may be repeated")
    parser.add_argument("--sample", type=int, default=bounds.SAMPLE, help="programs of a launch that are walked")
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton", help="cuda: needs nvcc and cmake")
    parser.add_argument("--launches", action="store_true", help="each launch by itself, too")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each pass")
    chosen = parser.parse_args(arguments)
    predictions = []
    for shape in SHAPES:
        if chosen.shape and not any(part in shape.name for part in chosen.shape):
            continue
        for prediction in predict(shape, chosen.sample, chosen.backend):
            predictions.append(prediction)
            if chosen.json:
                line = {**dataclasses.asdict(prediction), "bound": prediction.bound, "expected": prediction.expected}
                line["launches"] = [launch._asdict() for launch in prediction.launches]
                print(json.dumps(line), flush=True)
            elif chosen.launches:
                _show_launches(prediction)
    if not predictions:
        print(f"no shape is named like {', '.join(chosen.shape)}", file=sys.stderr)
        return 2
    if not chosen.json:
        _show(predictions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
