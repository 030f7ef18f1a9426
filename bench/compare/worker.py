"""The handle of the process that times one tree (`child.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from interformer_bench import waiting
from interformer_bench.compare.tree import RefusedError, Tree


class DiedError(Exception):
    """The process ended before it answered."""


class Worker:
    """A process that lives until it is closed, and computes only while a request is pending."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        # The tree comes first, as the current directory of `-m`; the bench and torch come from this process's path.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "interformer_bench.compare.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            cwd=tree.path,
            env={**os.environ, **waiting.ENVIRONMENT, "PYTHONPATH": paths},
        )
        try:
            self.kernels = self._read_greeting()
        except BaseException:
            self.close()
            raise

    def _read_greeting(self) -> str:
        """The instruction set of its kernels; the process must have imported the package of its own tree."""
        try:
            greeting = self._answer()
        except DiedError as error:
            raise RefusedError(f"{self.tree.name} cannot be measured by this tree's bench: {error}") from error
        imported = Path(greeting["package"]).resolve().parents[1]
        if imported != self.tree.path.resolve():
            raise RefusedError(f"{self.tree.name} lies in {self.tree.path}, but the package of {imported} was imported")
        return str(greeting["kernels"])

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process died, and reading its answer reports how
            print(json.dumps({"do": do, **job}), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.stderr.seek(0)
            last = (self.stderr.read().strip().splitlines() or [""])[-1]
            raise DiedError(f"its process ended with status {status}: {last}".rstrip(": "))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.process.terminate()
        self.process.wait()
        self.stderr.close()
