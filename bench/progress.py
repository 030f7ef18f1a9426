"""The progress of a long run: bars on a terminal (by rich, where it is installed), plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType
from typing import Any

from interformer_kernels._cli.tables import status_line


class Progress:
    """Receives stages, their steps, and the activity within a step; this base class displays nothing."""

    def begin(self, stage: str, steps: int) -> None:
        """A stage of `steps` steps begins."""

    def step(self, text: str) -> None:
        """The stage's next step begins."""

    def doing(self, text: str) -> None:
        """The current activity within the step."""

    def say(self, text: str) -> None:
        """A message that stays visible until the end."""

    def end(self) -> None:
        """End the display."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()


class Lines(Progress):
    """A line for each step with the seconds since the start, for logs."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.stage, self.done, self.steps = "", 0, 0

    def begin(self, stage: str, steps: int) -> None:
        self.stage, self.done, self.steps = stage, 0, steps

    def step(self, text: str) -> None:
        self.done += 1
        self.say(f"{self.stage} {self.done}/{self.steps}: {text}")

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:4.0f} s] {text}", file=sys.stderr, flush=True)


class OneLine(Lines):
    """One line of the terminal that is overwritten."""

    def step(self, text: str) -> None:
        self.done += 1
        status_line(f"{self.stage} {self.done}/{self.steps}: {text}")

    def say(self, text: str) -> None:
        status_line("")
        super().say(text)

    def end(self) -> None:
        status_line("")


class Bars(Progress):
    """The stage as a bar with its time; below it the step and the current activity.

    Bars are redrawn when something is reported, never by a thread: it would run beside the calls that are timed.
    """

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True) if console is None else console
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        self.bar = Bar(*columns, *times, console=console, auto_refresh=False)
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.task = self.bar.add_task("", total=None)
        self.begun, self.text = 0, ""
        self.live.start()

    def begin(self, stage: str, steps: int) -> None:
        self.bar.remove_task(self.task)
        self.task, self.begun = self.bar.add_task(stage, total=steps), 0

    def step(self, text: str) -> None:
        # The bar counts finished steps, and the step that begins now is not finished.
        self.bar.update(self.task, completed=self.begun)
        self.begun, self.text = self.begun + 1, text
        self.doing("")

    def doing(self, text: str) -> None:
        from rich.console import Group
        from rich.text import Text

        lines = [Text(line, overflow="ellipsis", no_wrap=True) for line in (self.text, f"  {text}")]
        self.live.update(Group(self.bar, *lines), refresh=True)

    def say(self, text: str) -> None:
        self.live.console.print(text, markup=False, highlight=False)

    def end(self) -> None:
        self.live.stop()


def shown() -> Progress:
    """The display that suits standard error."""
    if not sys.stderr.isatty():
        return Lines()
    return OneLine() if importlib.util.find_spec("rich") is None else Bars()
