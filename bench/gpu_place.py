"""Where the GPU's bench and checks run: on a GPU, or, for rehearsals, on the CPU; and what both commands share."""

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
from interformer_kernels._files import append_line, want_writable

BACKENDS = ("triton", "cuda")
Record = dict[str, Any]
Write = Callable[[Record], None]


@dataclass(frozen=True)
class Place:
    """Where it runs.

    Attributes:
        device: "cuda"; or "cpu", where the CPU's kernels stand in for those of every backend that is named.
        tiny: a few short rows, few repetitions: a rehearsal, whose times say nothing.
    """

    device: str = "cuda"
    tiny: bool = False

    @property
    def gpu(self) -> bool:
        """Whether there are graphs, streams and events."""
        return self.device == "cuda"

    def backend(self, named: str) -> str:
        """What serves in the name of a backend."""
        if self.gpu:
            return named
        return "cpu" if _backend.native() is not None else "reference"

    def about(self) -> Record:
        """What every record says of the place."""
        return {"device": self.device, "tiny": self.tiny}

    def why_not(self, op: str, backend: str, dtype: torch.dtype, channels: int = 0) -> str | None:
        """Why a named backend cannot serve an op here."""
        reason = _backend.unsupported_reason(op, self.backend(backend), self.device, dtype, channels)
        return None if reason is None else f"cannot serve: {reason}"

    def free_bytes(self) -> float:
        """Of the GPU's memory; unlimited on the CPU, where everything is tiny."""
        return timing.free_bytes(self.device) if self.gpu else math.inf

    def is_lost(self) -> bool:
        """Whether the GPU answers no more in this process, after an illegal access say."""
        try:
            timing.wait(self.device)
        except Exception:
            return True
        return False

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Work goes to this stream; nothing where there are none."""
        return torch.cuda.stream(stream) if self.gpu else contextlib.nullcontext()


def captured(run: Callable[[], Any], place: Place, warm_up: int = 2) -> tuple[Callable[[], None], Any]:
    """A run as a CUDA graph: what replays it, and what it returned (tensors that each replay writes anew).

    Without a GPU the replay is a run, whose tensors are copied into those of the first one.
    """
    if not place.gpu:
        kept = run()
        return lambda: _overwrite(kept, run()), kept
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            run()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = run()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails does not give it back
    return graph.replay, kept


def _overwrite(kept: Any, made: Any) -> None:
    if isinstance(kept, Mapping):
        for name in kept:
            _overwrite(kept[name], made[name])
    elif isinstance(kept, torch.Tensor):
        kept.data.copy_(made.detach())


def why_not_captured(run: Callable[[], Any]) -> str | None:
    """Why a run cannot become a CUDA graph, asked without trying: a capture that fails leaves torch's allocator unfit.

    PyTorch tells whether a run waits for the device, which no graph can.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return "waits for the device: lengths are read from it"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def told(error: Exception) -> str:
    """An exception in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line]
    return f"{type(error).__name__}: {(telling or lines or [''])[0][:200]}"


# ---------------------------------------------------------------- the commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both commands take."""
    add = parser.add_argument
    add("--list", action="store_true", help="what there is, in order of value: one JSON object a line")
    add("--only", action="append", metavar="NAME", help="one of the list; may be repeated")
    add("--backend", action="append", choices=BACKENDS, help="of this package; may be repeated; all where left out")
    add("--results", type=Path, metavar="FILE", help="gets a line of JSON for each result, at once")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--tiny", action="store_true", help="a few short rows and few repetitions, for rehearsals")


def list_them(found: Iterable[Mapping[str, Any]]) -> int:
    """Print them, a line each."""
    for one in found:
        print(json.dumps(one))
    return 0


def want_names(parser: argparse.ArgumentParser, asked: Sequence[str] | None, known: Sequence[str]) -> None:
    """Ends with status 2 where a name is unknown."""
    for name in asked or ():
        if name not in known:
            parser.error(f"--only: wanted a name of --list, found {name[:60]!r}")


def writer(parser: argparse.ArgumentParser, chosen: argparse.Namespace, place: Place) -> Write:
    """What appends a record to the results, with what every record says; ends the command where nothing can run."""
    if chosen.results is None:
        parser.error("wanted --results FILE (or --list)")
    if place.gpu and not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog}: needs a GPU that torch can use, found none\n")
    want_writable(chosen.results)

    def write(record: Record) -> None:
        append_line(chosen.results, {**record, **place.about()})

    return write
