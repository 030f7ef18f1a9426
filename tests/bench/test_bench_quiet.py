"""Whether the machine is quiet, and threads that sleep: what makes a check fail, and what a report says of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from interformer_bench import quiet, waiting
from interformer_bench.quiet import Quietness

CALM = Quietness(2, share=0.99, stolen=0.0, region=2e-5, single=1e-5)
LOADED = Quietness(2, share=0.5, stolen=0.0, region=2e-5, single=1e-5)


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (CALM, None),
        (LOADED, "a thread got 0.50 of a processor"),
        (Quietness(2, 0.99, 0.2, 2e-5, 1e-5), "a thread got 0.79 of a processor"),
        (Quietness(2, 0.99, 0.0, 9e-4, 1e-5), "a parallel region costs 890 us"),
    ],
    ids=["quiet", "shared", "stolen", "slow to start"],
)
def test_a_machine_is_busy_for_a_reason_with_figures(check: Quietness, reason: str | None) -> None:
    assert (check.busy is None) == (reason is None)
    assert (reason or "") in (check.busy or "")


def test_a_check_measures_and_keeps_the_number_of_threads() -> None:
    import torch

    before = torch.get_num_threads()
    check = quiet._check_once(2)
    assert torch.get_num_threads() == before
    assert check.threads == 2
    assert 0 < check.share <= 1.01
    assert check.region > 0 < check.single


def planted(monkeypatch: pytest.MonkeyPatch, *checks: Quietness) -> None:
    remaining: Iterator[Quietness] = iter(checks)
    monkeypatch.setattr(quiet, "_check_once", lambda threads: next(remaining))


def test_something_short_does_not_make_a_machine_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, LOADED, CALM, LOADED, LOADED)
    assert quiet.check(2).busy is None
    assert quiet.check(2).busy is not None


def test_a_load_marks_what_lies_beside_its_checks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, CALM, CALM, LOADED, LOADED, CALM, CALM)
    watch = quiet.Watch(2)
    assert [watch.busy_since_last() is None for _ in range(4)] == [True, False, False, True]
    assert "BUSY in 1 of 5 checks, first: a thread got 0.50" in quiet.described(watch.checks)
    assert quiet.described([CALM]).startswith("The machine was quiet (")
    assert "not checked" in quiet.described([])


@pytest.mark.parametrize(("others", "marked"), [(0.0, False), (0.1, False), (0.9, True)])
def test_a_load_in_the_middle_of_a_measurement_marks_it_alone(
    others: float, marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, *[CALM] * 3)
    used, own, now = iter((10.0, 12.0 + others)), iter((3.0, 5.0)), iter((0.0, 1.0))
    monkeypatch.setattr(quiet, "_used_seconds", lambda: next(used))
    monkeypatch.setattr(quiet.os, "times", lambda: (next(own), 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(quiet.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(quiet.time, "perf_counter", lambda: next(now))
    watch = quiet.Watch(2)
    assert watch.during(lambda: "result") == "result"
    reason = "others used 0.90 processors meanwhile, 0 were spare"
    assert watch.busy_since_last() == (reason if marked else None)
    assert watch.busy_since_last() is None


def test_a_command_starts_itself_again_with_sleeping_threads() -> None:
    program = (
        "import os, sys; from interformer_bench import waiting; assert 'torch' not in sys.modules; "
        "waiting.restart({'EXTRA': 'yes'}); print(os.environ['EXTRA'], *sys.argv[1:], waiting.described())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in waiting.ENVIRONMENT}
    command = [sys.executable, "-c", program, "given"]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert completed.stdout == (
        "yes given Threads sleep while they wait; freed memory is kept, for all contenders alike.\n"
    )


def test_threads_that_may_spin_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "MAY SPIN" in waiting.described()
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    assert "MEMORY IS NOT KEPT" in waiting.described()
