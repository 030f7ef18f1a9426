"""The process that times one `interformer_kernels`: it answers messages, a line of JSON each, until its input ends.

`prepare` checks and warms up a call, `sample` times it once. The bench is this tree's; `interformer_kernels` is the one
that comes first on the path.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from interformer_bench import checks, report, run, timing, workloads
from interformer_bench.peers import OURS, Peer
from interformer_bench.workloads import Sizes

import interformer_kernels

Message = dict[str, Any]
# A sample repeats calls until it takes this long.
_SAMPLE_SECONDS = 5e-3


class Timer:
    """The call that was prepared last."""

    def __init__(self) -> None:
        self.shape: Message = {}
        self.call: timing.TimedCall = lambda: None
        self.typical, self.repeats = 0.0, 1

    def prepare(self, job: Message) -> Message:
        """Make the job's inputs, check a few rows and warm up; returns the seconds of a call, or the problem."""
        kernel = workloads.kernel_of(job["op"])
        if not hasattr(interformer_kernels, kernel):
            return {"problem": f"has no {kernel}"}
        try:
            torch.set_num_threads(job["threads"])
            problem = self._inputs(job)
            if problem is not None:
                return {"problem": problem}
            self.call = run.runner(job["op"], self.peer, self.arguments, job["direction"])
            self.typical = timing.quickest(self.call)
        except Exception as error:
            return {"problem": f"failed: {type(error).__name__}: {str(error).strip()[:200]}"}
        self.repeats = max(1, math.ceil(_SAMPLE_SECONDS / self.typical))
        return {"seconds": self.typical}

    def _inputs(self, job: Message) -> str | None:
        """Make new inputs where the shape has changed; returns the problem of this package on this shape, if any."""
        shape = {name: job[name] for name in ("op", "lengths", "sizes", "dtype")}
        if shape != self.shape:
            self.shape = {}
            op, lengths, sizes, dtype = job["op"], job["lengths"], Sizes(**job["sizes"]), getattr(torch, job["dtype"])
            self.peer = Peer(workloads.ours(op))
            small = checks.small_lengths(lengths, sizes.heads)
            self.problem = checks.Checker(op, small, sizes, dtype).check(OURS, self.peer).problem
            self.arguments = workloads.inputs(op, lengths, sizes, dtype)
            self.shape = shape
        return self.problem

    def sample(self, job: Message) -> Message:
        """Seconds of one call, and of all calls of this sample."""
        seconds = timing.settled(self.call, self.typical, repeats=self.repeats)
        return {"seconds": seconds, "spent": seconds * self.repeats}


def main() -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides when to stop
    # Standard output carries answers only: everything else that is printed goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(content: Message) -> None:
        print(json.dumps(content), file=answers, flush=True)

    timer = Timer()
    handlers: dict[str, Callable[[Message], Message]] = {"prepare": timer.prepare, "sample": timer.sample}
    send({"package": interformer_kernels.__file__, "kernels": report.isa()})
    for line in sys.stdin:
        request = json.loads(line)
        send(handlers[request["do"]](request))


if __name__ == "__main__":
    main()
