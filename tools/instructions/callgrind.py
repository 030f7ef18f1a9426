"""Runs a Python process under callgrind and reads the instructions between its marks, by library.

The process imports and warms up uncounted, which callgrind does about ten times as fast, and says `READY`. Counting is
then switched on from outside. Each mark (`os.getppid()`, which nothing else calls) writes what was counted since the
one before into a file of its own.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

READY = "ready to be counted"
_TOOLS = ("valgrind", "callgrind_control")
_OBJECT = re.compile(r"(c?ob)=(\(\d+\))(?: (.*))?")


def unsupported_reason() -> str | None:
    """The reason why nothing can be counted here; None where it can."""
    missing = [name for name in _TOOLS if shutil.which(name) is None]
    return f"needs valgrind, which has {' and '.join(missing)} (apt install valgrind)" if missing else None


def counts(arguments: Sequence[str], environment: Mapping[str, str], marks: int) -> list[Counter[str]]:
    """Instructions by library between the `marks` of `python arguments`, which calls `wait_for_start` and `mark`."""
    reason = unsupported_reason()
    if reason is not None:
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as folder:
        output = f"--callgrind-out-file={folder}/out"
        options = ["--tool=callgrind", "--instr-atstart=no", "--dump-before=getppid", output]
        process = subprocess.Popen(
            ["valgrind", "--quiet", *options, sys.executable, *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        while (line := process.stdout.readline()) and line.strip() != READY:
            pass
        if line:
            subprocess.run(["callgrind_control", "-i", "on", str(process.pid)], check=True, capture_output=True)
        _, errors = process.communicate("start\n" if line else None)
        if process.returncode:
            said = (errors.strip().splitlines() or [f"status {process.returncode}"])[-1]
            raise RuntimeError(f"the counted process failed: {said}")
        # The first file ends at the first mark, so what it counts lies before them all.
        return [parse((Path(folder) / f"out.{part}").read_text()) for part in range(2, marks + 1)]


def parse(text: str) -> Counter[str]:
    """The instructions of each library's own functions, by file name, from a file that callgrind wrote."""
    names: dict[str, str] = {}
    instructions: Counter[str] = Counter()
    library, of_callee = "", False
    for line in text.splitlines():
        found = _OBJECT.fullmatch(line)
        if found:
            kind, key, name = found.groups()
            if name:
                names[key] = Path(name).name
            if kind == "ob":
                library = names[key]
        elif line.startswith("calls="):
            of_callee = True  # the next line has what the called function took, which is counted there
        elif line[:1] in tuple("+-*0123456789"):
            if not of_callee:
                instructions[library] += int(line.split()[1])
            of_callee = False
    return instructions


def wait_for_start() -> None:
    """In the counted process: say that it is ready, and wait; valgrind obeys only where the process moves."""
    print(READY, flush=True)
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        pass


def mark() -> None:
    """In the counted process: what follows goes into the next file."""
    os.getppid()
