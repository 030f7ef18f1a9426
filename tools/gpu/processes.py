"""One step's processes: started in a session of their own, listened to in bounded memory, and ended to the last one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gpu.guard import MARK, end_marked, marked

_FIRST, _LAST = 16 << 10, 48 << 10  # bytes of a step's output that are kept
_READ = 64 << 10
_MOMENT = 1.0  # seconds that its helpers may go on when a step has ended
_PATIENCE = 5.0  # seconds that a killed process may take to go


class End(NamedTuple):
    """The end of a step: `code` as `subprocess` has it, None where it was ended from outside."""

    code: int | None
    output: str
    left_behind: int  # processes that still ran when the first one had ended
    stuck: bool  # whether it survived being killed


class Running:
    """A command that runs, with all that it starts."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], mark: str, limit: float, folder: Path
    ) -> None:
        """Raises OSError where it cannot be started."""
        self.mark, self.began = mark, time.monotonic()
        self.end = self.began + limit
        self.talks = True
        self._first, self._last = bytearray(), deque[bytes]()
        self._last_bytes = self._dropped = 0
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**environment, MARK: mark},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        with contextlib.suppress(OSError):  # where memory runs out, the system should end a step, not the report
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000")

    def fileno(self) -> int:
        """The file descriptor of the step's output, for `select`."""
        return self._pipe

    def listen(self) -> None:
        """Read its output so far; bounded, so that a step that never stops writing does not hold up the others."""
        for _ in range(64):
            try:
                part = os.read(self._pipe, _READ)
            except BlockingIOError:
                return
            if not part:
                self.talks = False
                return
            self._keep(part)

    def _keep(self, part: bytes) -> None:
        """Keep the first bytes and the last ones."""
        room = _FIRST - len(self._first)
        self._first += part[:room]
        if part[room:]:
            self._last.append(part[room:])
            self._last_bytes += len(part[room:])
        while self._last_bytes - len(self._last[0] if self._last else b"") > _LAST:
            self._dropped += len(self._last[0])
            self._last_bytes -= len(self._last.popleft())

    def has_ended(self) -> bool:
        """Whether the first process is done; it is not reaped yet, so that its group's number stays its own."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def finish(self) -> End:
        """End the whole group and every process that bears the mark, and say how it ended."""
        by_itself = self.has_ended()
        left_behind = self._left_behind() if by_itself else set()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        end_marked(self.mark)
        stuck = False
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            code, stuck = None, True
        self.listen()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return End(code if by_itself else None, self._output(), len(left_behind), stuck)

    def _left_behind(self) -> set[int]:
        """Processes that outlive the first one; helpers that notice its end get a moment to end, too."""
        end = time.monotonic() + _MOMENT
        while (processes := set(marked(self.mark)) - {self._process.pid}) and time.monotonic() < end:
            time.sleep(0.05)
        return processes

    def _output(self) -> str:
        first, last = bytes(self._first), b"".join(self._last)
        gap = f"\n... {self._dropped} bytes left out ...\n".encode() if self._dropped else b""
        return (first + gap + last).decode(errors="replace")
