"""`make instruction-counts`: its reading of callgrind's files, and its comparison with the record."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

from instructions import __main__ as command  # noqa: E402
from instructions import callgrind, calls  # noqa: E402

NATIVE, ALL = command.NATIVE, command.ALL
HERE = {"python": "3.11.7", "torch": "2.13.0", "compiler": "GNU 12.2.0"}

WRITTEN = """\
# callgrind format
version: 1
part: 2
desc: Trigger: --dump-before=getppid
positions: line
events: Ir
summary: 1160

ob=(57) /somewhere/_C.cpython-311.so
fl=(80) ???
fn=(1242) interformer::read
0 220
cob=(1) /lib/libpython3.11.so.1.0
cfi=(31) unicodeobject.c
cfn=(1184) PyUnicode_AsUTF8
calls=10 4173
+3 5000
-2 40
* 60

ob=(1)
fn=(1184)
4173 800
ob=(57)
fn=(1242)
+1 40
totals: 1160
"""


def test_instructions_are_counted_for_the_library_that_runs_them() -> None:
    assert callgrind.parse(WRITTEN) == {"_C.cpython-311.so": 360, "libpython3.11.so.1.0": 800}


def test_figures_are_of_a_call_or_a_row() -> None:
    counted = [Counter({"_C.so": 100, "libc.so.6": 50}), Counter({"_C.so": 300, "libc.so.6": 60, "libm.so.6": 10})]
    assert command.figures(counted, [("a call", 10)]) == {"a call": {NATIVE: 20, ALL: 22}}


@pytest.mark.parametrize(
    ("native", "everything", "judged"),
    [(1000, 5000, "same"), (1050, 5000, "MORE"), (1000, 5500, "MORE"), (900, 5000, "fewer"), (900, 5500, "MORE")],
)
def test_more_instructions_than_recorded_are_noticed(native: int, everything: int, judged: str) -> None:
    recorded = {NATIVE: 1000, ALL: 5000}
    assert command.verdict({NATIVE: native, ALL: everything}, recorded, (NATIVE, ALL)) == judged


def test_a_call_without_a_record_is_no_success() -> None:
    assert command.verdict({NATIVE: 1, ALL: 1}, None, (NATIVE,)) == "MORE: not recorded"


@pytest.mark.parametrize(
    ("changed", "kinds", "said"),
    [
        ({}, (NATIVE, ALL), None),
        ({"torch": "2.11.0"}, (NATIVE,), "only the native module is held: torch 2.11.0, recorded with 2.13.0"),
        ({"compiler": "GNU 14"}, (), "nothing is held against the record: compiler GNU 14, recorded with GNU 12.2.0"),
    ],
    ids=["same", "another torch", "another compiler"],
)
def test_another_environment_holds_less_and_says_so(
    changed: dict[str, str], kinds: tuple[str, ...], said: str | None
) -> None:
    assert command.held(HERE | changed, HERE) == (kinds, said)


def test_every_counted_call_is_recorded() -> None:
    if not command.RECORDED.exists():
        pytest.skip("no record yet: make instruction-counts ARGS=--record")
    recorded = json.loads(command.RECORDED.read_text())
    assert set(recorded["figures"]) == {name for name, _ in calls.names()}
    assert set(recorded["environment"]) == set(command.environment())


@pytest.mark.parametrize("extra", [0, 100])
def test_the_command_says_what_takes_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, extra: int
) -> None:
    def counted(*_: object) -> list[Counter[str]]:
        return [Counter({"_C.so": n}) for _, more in calls.names() for n in (0, more * (1000 + extra))]

    monkeypatch.setattr(callgrind, "unsupported_reason", lambda: None)
    monkeypatch.setattr(callgrind, "counts", counted)
    monkeypatch.setattr(command, "RECORDED", tmp_path / "recorded.json")
    monkeypatch.setattr(command, "environment", lambda: HERE)
    figures = {name: {NATIVE: 1000, ALL: 1000} for name, _ in calls.names()}
    command.RECORDED.write_text(json.dumps({"environment": HERE, "figures": figures}))
    assert command.main([]) == (1 if extra else 0)
    assert ("MORE" in capsys.readouterr().out) is bool(extra)
    assert command.main(["--record"]) == 0
    assert command.main([]) == 0


def test_a_machine_without_valgrind_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="make instruction-counts needs valgrind"):
        command.main([])


COUNTED = """
from instructions import callgrind
callgrind.wait_for_start()
for times in (1000, 1000, 2000):
    callgrind.mark()
    for _ in range(times):
        hash("")
callgrind.mark()
"""


def test_callgrind_counts_between_marks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reason = callgrind.unsupported_reason()
    if reason is not None:
        pytest.skip(reason)
    program = tmp_path / "counted.py"
    program.write_text(COUNTED)
    _, once, twice = (
        sum(part.values())
        for part in callgrind.counts([str(program)], {"PYTHONPATH": str(ROOT / "tools"), "PYTHONHASHSEED": "0"}, 4)
    )
    assert 1.8 < twice / once < 2.1


def test_a_counted_process_that_fails_is_reported(tmp_path: Path) -> None:
    reason = callgrind.unsupported_reason()
    if reason is not None:
        pytest.skip(reason)
    with pytest.raises(RuntimeError, match="the counted process failed: ValueError: broken"):
        callgrind.counts(["-c", "raise ValueError('broken')"], {}, 1)
