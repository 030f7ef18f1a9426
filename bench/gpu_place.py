"""The device of the GPU's bench and checks, a GPU or the CPU for rehearsals, and the options of both commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from interformer_bench import timing

from interformer_kernels import _backend
from interformer_kernels._files import append_line, check_writable

BACKENDS = ("triton", "cuda")
Record = dict[str, Any]
Write = Callable[[Record], None]


@dataclass(frozen=True)
class Place:
    """The device that everything runs on.

    Attributes:
        device: "cuda", or "cpu", where CPU kernels stand in for every named backend.
        tiny: whether this is a rehearsal: a few short rows, few repetitions, meaningless times.
    """

    device: str = "cuda"
    tiny: bool = False

    @property
    def gpu(self) -> bool:
        """Whether there are graphs, streams and events."""
        return self.device == "cuda"

    def backend(self, named: str) -> str:
        """The backend that actually runs under the name of a backend."""
        if self.gpu:
            return named
        return "cpu" if _backend.native() is not None else "reference"

    def about(self) -> Record:
        """The fields that every record has."""
        return {"device": self.device, "tiny": self.tiny}

    def unsupported_reason(self, op: str, backend: str, dtype: torch.dtype, channels: int = 0) -> str | None:
        """The reason why a named backend cannot serve an op here, or None."""
        reason = _backend.unsupported_reason(op, self.backend(backend), self.device, dtype, channels)
        return None if reason is None else f"cannot serve: {reason}"

    def free_bytes(self) -> float:
        """Bytes of free GPU memory; unlimited on the CPU, where everything is tiny."""
        return timing.free_bytes(self.device) if self.gpu else math.inf

    def is_lost(self) -> bool:
        """Whether the GPU no longer responds in this process, after an illegal access for example."""
        try:
            timing.wait(self.device)
        except Exception:
            return True
        return False

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """A context in which work goes to this stream; without effect on the CPU."""
        return torch.cuda.stream(stream) if self.gpu else contextlib.nullcontext()


def capture_graph(call: Callable[[], Any], place: Place, warm_up: int = 2) -> tuple[Callable[[], None], Any]:
    """A call as a CUDA graph: the function that replays it, and the call's result, whose tensors each replay rewrites.

    On the CPU a replay calls again and copies the new tensors into those of the first result.
    """
    if not place.gpu:
        result = call()
        return lambda: _overwrite(result, call()), result
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            call()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = call()
    finally:
        torch.cuda.set_stream(before)  # a failed capture does not restore it
    return graph.replay, result


def _overwrite(target: Any, source: Any) -> None:
    if isinstance(target, Mapping):
        for name in target:
            _overwrite(target[name], source[name])
    elif isinstance(target, torch.Tensor):
        target.data.copy_(source.detach())


def no_capture_reason(call: Callable[[], Any]) -> str | None:
    """The reason why a call cannot become a CUDA graph, without a capture: a failed one leaves the allocator unusable.

    PyTorch reports whether a call synchronises with the device, which is impossible in a graph.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return "waits for the device: lengths are read from it"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


# ---------------------------------------------------------------- the commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that both commands have."""
    add = parser.add_argument
    add("--list", action="store_true", help="print the entries in order of value, one JSON object a line")
    add("--only", action="append", metavar="NAME", help="an entry of the list; may be repeated")
    add("--backend", action="append", choices=BACKENDS, help="a backend of this package; may be repeated; default: all")
    add("--results", type=Path, metavar="FILE", help="append each result to FILE at once, as a line of JSON")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--tiny", action="store_true", help="a few short rows and few repetitions, for rehearsals")


def print_list(entries: Iterable[Mapping[str, Any]]) -> int:
    """Print the entries, a line of JSON each."""
    for entry in entries:
        print(json.dumps(entry))
    return 0


def require_known_names(
    parser: argparse.ArgumentParser, names: Sequence[str] | None, valid_names: Sequence[str]
) -> None:
    """End the command with status 2 where a name is unknown."""
    for name in names or ():
        if name not in valid_names:
            parser.error(f"--only: wanted a name of --list, found {name[:60]!r}")


def writer(parser: argparse.ArgumentParser, chosen: argparse.Namespace, place: Place) -> Write:
    """A function that appends a record to the results; ends the command where nothing can run."""
    if chosen.results is None:
        parser.error("wanted --results FILE (or --list)")
    if place.gpu and not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog}: needs a GPU that torch can use, found none\n")
    check_writable(chosen.results)

    def write(record: Record) -> None:
        append_line(chosen.results, {**record, **place.about()})

    return write
