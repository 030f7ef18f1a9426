"""Comparing two trees: the rule, interleaving, the build of the other ref, and the exit status; on planted times."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from interformer_bench import grid, shapes
from interformer_bench.compare import child, interleaved, tree, verdicts
from interformer_bench.compare.__main__ import main
from interformer_bench.compare.tree import RefusedError, Tree
from interformer_bench.compare.verdicts import ComparedCase, Comparison, TreeTiming
from interformer_bench.compare.worker import DiedError, Worker
from interformer_bench.timing import Timing

import interformer_kernels

LINE = ComparedCase("pma_pooling", "beauty", "fitted", 2, 10, "H4 D16 M2", "float32", 2, "forward")
CHOSEN = ["--op", "personalized_ffn", "--law", "movielens", "--rows", "4", "--threads", "1", "--quick"]


def timed(median: float, spread: float = 0.0, samples: int = 9) -> TreeTiming:
    return TreeTiming(Timing(median, median - spread, median + spread, samples))


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("old", "new", "second_run", "expected"),
    [
        (timed(1.0, 0.1), timed(1.5, 0.1), (timed(1.0), timed(1.5)), "REGRESSION"),
        (timed(1.0, 0.1), timed(1.5, 0.1), (timed(1.0, 0.3), timed(1.5, 0.3)), "same: slower once of twice"),
        (timed(1.0, 0.1), timed(1.5, 0.1), (timed(1.5), timed(1.0)), "same: slower once of twice"),
        (timed(1.0, 0.1), timed(1.5, 0.1), None, "slower once, not repeated"),
        (timed(1.0, 0.3), timed(1.5, 0.3), None, "same"),  # the quartiles overlap
        (timed(1.0), timed(1.04), None, "same"),  # apart, but by too little
        (timed(1.0, samples=4), timed(1.5), None, "too few samples"),
        (timed(1.5, 0.1), timed(1.0, 0.1), (timed(1.5), timed(1.0)), "faster"),
        (TreeTiming(problem="has no pma_pooling"), timed(1.0), None, "only new: old has no pma_pooling"),
        (timed(1.0), TreeTiming(problem="wrong out"), None, "BROKEN: new wrong out"),
        (timed(1.0), timed(1.5), (timed(1.0), TreeTiming(problem="died")), "BROKEN in the second run: died"),
        (TreeTiming(problem="a"), TreeTiming(problem="b"), None, "neither: old a; new b"),
    ],
)
def test_a_regression_is_what_the_spread_does_not_explain(
    old: TreeTiming, new: TreeTiming, second_run: tuple[TreeTiming, TreeTiming] | None, expected: str
) -> None:
    comparison = Comparison(LINE, old, new, second_run)
    assert verdicts.verdict(comparison) == expected
    assert verdicts.failed([comparison]) == ([comparison] if expected.startswith(("REGRESSION", "BROKEN")) else [])


def test_the_table_shows_both_trees_and_both_runs() -> None:
    comparisons = [
        Comparison(LINE, timed(0.010, 0.001), timed(0.020, 0.001), (timed(0.010), timed(0.021))),
        Comparison(LINE, TreeTiming(problem="has no pma_pooling"), timed(2.0)),
    ]
    first, second = (row[7:] for row in verdicts.table(comparisons))
    assert first == ("10 ms (9..11, 9)", "20 ms (19..21, 9)", "2.00, 2.10", "REGRESSION")
    assert second == ("-", "2 s (2..2, 9)", "-", "only new: old has no pma_pooling")
    assert verdicts.summary(comparisons) == "2 lines: 1 REGRESSION, 1 only new."


# ---------------------------------------------------------------- interleaving


class Planted:
    """A stand-in for a worker: the old tree's calls take about a second, the new tree's `factor` times as long."""

    factor: ClassVar[float] = 1.0
    sampled: ClassVar[list[str]] = []
    started: ClassVar[list[str]] = []
    dies: ClassVar[set[str]] = set()

    def __init__(self, tree: Tree) -> None:
        self.tree, self.kernels = tree, "avx2"
        self.started.append(tree.name)
        jitter = itertools.cycle((1.0, 1.02, 1.01))
        self.times: Iterator[float] = (
            next(jitter) * (self.factor if tree.name == "new" else 1.0) for _ in iter(int, 1)
        )

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        if do == "prepare":
            return {"seconds": 1.0}
        self.sampled.append(self.tree.name)
        if self.tree.name in self.dies:
            raise DiedError("its process ended with status -11")
        seconds = next(self.times)
        return {"seconds": seconds, "spent": seconds}

    def close(self) -> None:
        pass


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> type[Planted]:
    """Two planted trees instead of processes; nothing is built."""
    kind = type("Fresh", (Planted,), {"sampled": [], "started": [], "dies": set()})
    monkeypatch.setattr(interleaved, "Worker", kind)
    monkeypatch.setattr(interleaved, "_PAUSE", 0.0)
    monkeypatch.setattr(tree, "current", lambda: Tree(Path(), "new"))
    monkeypatch.setattr(tree, "at_ref", lambda root, ref, say: Tree(Path(), "old"))
    return kind


def some_jobs() -> list[interleaved.Job]:
    shape = grid.Shape("pma_pooling", shapes.length_distributions("nowhere")["diginetica"], rows=8)
    return interleaved.jobs([shape], None, (2, 1))


def test_every_pass_on_every_number_of_threads_is_a_job() -> None:
    passes = [(job.case.threads, job.case.direction) for job in some_jobs()]
    assert passes == [(2, "forward"), (2, "forward+backward"), (1, "forward"), (1, "forward+backward")]
    request = json.loads(json.dumps(some_jobs()[0].request))
    assert request["sizes"]["head_size"] == 16
    assert sum(request["lengths"]) == some_jobs()[0].case.tokens


def test_trees_take_turns_and_neither_always_follows_the_other(planted: type[Planted]) -> None:
    pair = interleaved.Pair(Tree(Path(), "old"), Tree(Path(), "new"))
    old, new = pair.measure(some_jobs()[0], seconds=9.0)
    assert planted.sampled == ["old", "new", "new", "old"] * 2 + ["old", "new"]
    assert old.time == new.time == Timing.of([1.0, 1.02, 1.01, 1.0, 1.02])


def test_a_planted_slowdown_is_a_regression(
    planted: type[Planted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted.factor = 1.2
    assert main(["some-ref", *CHOSEN, "--seconds", "9", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "2 lines: 2 REGRESSION." in printed.out
    assert verdicts.RULE in printed.out
    assert "second run 2/2: personalized_ffn, float32: 4 rows, movielens" in printed.err
    assert planted.started == ["old", "new"] * 2  # the second run is of new processes
    written = json.loads((tmp_path / "compare.json").read_text())
    assert [line["verdict"] for line in written["lines"]] == ["REGRESSION"] * 2
    assert written["lines"][0]["new"]["time"]["median"] == pytest.approx(
        1.2 * written["lines"][0]["old"]["time"]["median"]
    )
    assert "| 1.20, 1.20 | REGRESSION |" in (tmp_path / "compare.md").read_text()


def test_what_is_as_fast_ends_with_0_and_is_not_repeated(planted: type[Planted], tmp_path: Path) -> None:
    planted.factor = 1.01
    assert main(["some-ref", *CHOSEN, "--seconds", "9", "--out", str(tmp_path)]) == 0
    assert planted.started == ["old", "new"]


def test_a_process_that_dies_is_shown_and_the_others_go_on(planted: type[Planted], tmp_path: Path) -> None:
    planted.dies.add("new")
    assert main(["some-ref", *CHOSEN, "--seconds", "9", "--out", str(tmp_path)]) == 1
    lines = json.loads((tmp_path / "compare.json").read_text())["lines"]
    assert [line["verdict"] for line in lines] == ["BROKEN: new its process ended with status -11"] * 2
    assert all(line["old"]["time"] for line in lines)
    assert planted.started == ["old", "new", "new", "new"]


def test_where_neither_tree_can_be_timed_it_ends_with_2(
    planted: type[Planted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted.dies.update(("old", "new"))
    assert main(["some-ref", *CHOSEN, "--seconds", "9", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "2 lines: 2 neither." in printed.out
    assert printed.err.endswith("bench-compare: neither tree could be timed on any line\n")


# ---------------------------------------------------------------- processes


def test_a_tree_against_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command but for the build; one sample is too few, and the verdict says so."""
    monkeypatch.setattr(tree, "at_ref", lambda root, ref, say: Tree(root, ref))
    assert main(["itself", *CHOSEN, "--seconds", "0", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "compare.json").read_text())
    assert "against itself; kernels: " in written["heading"]
    assert [line["verdict"] for line in written["lines"]] == ["too few samples"] * 2
    assert all(line[side]["time"]["samples"] == 1 for line in written["lines"] for side in ("old", "new"))


def test_what_a_tree_lacks_or_gets_wrong_is_a_problem_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    request = some_jobs()[0].request
    timer = child.Timer()
    monkeypatch.setattr(child.timing, "once", lambda run, device="cpu", repeats=1: 0.5)
    assert timer.prepare(request) == {"seconds": 0.5}
    assert timer.sample(request) == {"seconds": 0.5, "spent": 0.5}
    pma_pooling = interformer_kernels.pma_pooling
    monkeypatch.setattr(interformer_kernels, "pma_pooling", lambda *a, **k: pma_pooling(*a, **k) * 1.001)
    assert "wrong out" in child.Timer().prepare(request)["problem"]
    monkeypatch.delattr(interformer_kernels, "pma_pooling")
    assert child.Timer().prepare(request) == {"problem": "has no pma_pooling"}


def test_a_tree_that_the_bench_cannot_measure_says_why(tmp_path: Path) -> None:
    package = tmp_path / "interformer_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('is of another age')")
    with pytest.raises(RefusedError, match=r"old cannot be measured by this tree's bench: .* is of another age"):
        Worker(Tree(tmp_path, "old"))


# ---------------------------------------------------------------- the other ref


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit, which the package seems to be imported from."""
    package = tmp_path / "interformer_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("age = 1\n")
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("build/\n")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    monkeypatch.setattr(interformer_kernels, "__file__", str(package / "__init__.py"))
    return tmp_path


def test_a_ref_is_built_once_and_only_its_package_stays(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(source: Path, target: Path, log: Path) -> None:
        for name in ("interformer_kernels", "interformer_bench"):
            (target / name).mkdir(parents=True)
        (target / "interformer_kernels/age").write_text((source / "interformer_kernels/__init__.py").read_text())

    monkeypatch.setattr(tree, "_pip", pip)
    (repository / "interformer_kernels/__init__.py").write_text("age = 2\n")  # in this tree only
    messages: list[str] = []
    trees = [tree.at_ref(repository, "HEAD", messages.append) for _ in range(2)]
    assert trees[0] == trees[1]
    assert len(messages) == 1
    assert [entry.name for entry in trees[0].path.iterdir()] == ["interformer_kernels"]
    assert (trees[0].path / "interformer_kernels/age").read_text() == "age = 1\n"
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_ref_that_does_not_build_leaves_nothing_behind(repository: Path) -> None:
    with pytest.raises(RefusedError, match=r"HEAD \(\w+\): it does not build \(all of its output: .*\.log\)"):
        tree.at_ref(repository, "HEAD", lambda text: None)  # it has no setup.py
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert not list((repository / "build/compare").glob("*/site"))


@pytest.mark.parametrize("ref", ["no-such-branch", "--help-me"])
def test_an_unknown_ref_ends_with_2(repository: Path, ref: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CHOSEN, "--", ref]) == 2
    assert f"bench-compare: git knows no commit named {ref!r} in {repository}" in capsys.readouterr().err


def test_a_dirty_tree_is_named_so(repository: Path) -> None:
    assert tree.current().name.endswith(")")
    assert "uncommitted" not in tree.current().name
    (repository / "interformer_kernels/new.py").touch()
    assert "with uncommitted changes, as it lies" in tree.current().name


def test_no_checkout_ends_with_2(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interformer_kernels, "__file__", str(repository / "build/site/interformer_kernels/__init__.py"))
    assert main(["HEAD", *CHOSEN]) == 2
    assert "which is no git checkout" in capsys.readouterr().err
