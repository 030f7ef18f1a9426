"""The checks for a GPU, on the CPU's kernels at tiny size: nothing is found there, and every planted fault is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_stand_in
import pytest
import torch
from interformer_bench import check_calls, check_rows, gpu_checks
from interformer_bench.check_context import CheckContext, Finding, Inputs, difference, row_at, same_bits
from interformer_bench.gpu_place import Place
from torch import Tensor

import interformer_kernels
from interformer_kernels import testing

PLACE = Place("cpu", tiny=True)
SERVED = PLACE.backend("triton")
OPS = testing.OPS
Made = tuple[Tensor, "Tensor | None"]
Serve = Callable[[str, Inputs], Made]


def served(op: str, inputs: Inputs) -> Made:
    return testing.call(op, inputs, SERVED)


def ask(kind: str, op: str, serve: Serve = served, place: Place = PLACE) -> list[Finding]:
    return list(gpu_checks.KINDS[kind].run(CheckContext(place, op, "triton", serve)))


def found_wrong(kind: str, op: str, serve: Serve, place: Place = PLACE) -> list[Finding]:
    return [one for one in ask(kind, op, serve, place) if one.ok is False]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", gpu_checks.KINDS)
def test_nothing_is_found_on_the_cpu(kind: str, op: str) -> None:
    found = ask(kind, op)
    assert found
    assert [one for one in found if one.ok is not True] == []


# ---------------------------------------------------------------- planted faults


class Spoil(torch.autograd.Function):
    """Leaves numbers as they are, and changes one place of their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: int) -> Tensor:
        ctx.place = place
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[ctx.place] *= 1.5
        return grad, None


def rows_of(inputs: Inputs) -> int:
    return len(inputs["kv_offsets"] if "kv_offsets" in inputs else inputs["offsets"]) - 1


def place_of_row(op: str, inputs: Inputs, row: int) -> int:
    """Where row `row` begins in the output: itself, or its first token."""
    return row if op in ("pma_pooling", "gated_cross_attention") else int(inputs["offsets"][row])


def spoiled_out(row: int, least: int) -> Serve:
    """Of batches of `least` rows and more, row `row` has one number that is a bit larger."""

    def serve(op: str, inputs: Inputs) -> Made:
        out, lse = served(op, inputs)
        if rows_of(inputs) >= least:
            change = torch.zeros_like(out)
            change[place_of_row(op, inputs, row)] = 0.05
            out = out + change
        return out, lse

    return serve


def spoiled_gradient(row: int, least: int) -> Serve:
    """Of batches of `least` rows and more, the gradient of row `row` of x, or of k, is wrong at its first token."""

    def serve(op: str, inputs: Inputs) -> Made:
        if rows_of(inputs) < least:
            return served(op, inputs)
        name = "x" if "x" in inputs else "k"
        offsets = inputs["kv_offsets"] if "kv_offsets" in inputs else inputs["offsets"]
        return served(op, {**inputs, name: Spoil.apply(inputs[name], int(offsets[row]))})

    return serve


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("spoil", [spoiled_out, spoiled_gradient])
def test_a_row_that_differs_in_a_large_batch_is_found_and_named(op: str, spoil: Callable[[int, int], Serve]) -> None:
    row = 7  # the long one
    found = found_wrong("large-batch", op, spoil(row, len(check_rows.lengths_of(True))))
    kinds = {one.what.partition(",")[0] for one in found}
    assert {"slices of the batch", "rows alone"} <= kinds
    for one in found:
        if one.what.startswith(("slices", "rows alone")):
            assert one.row == row
            assert one.quantity in ("out", "dx", "dk")
            assert one.index is not None
            assert one.differing > 0
    if spoil is spoiled_out:
        assert any("against float64" in kind for kind in kinds)


@pytest.mark.parametrize("op", OPS)
def test_rows_that_are_wrong_wherever_they_are_are_found(op: str) -> None:
    """The same wrong bits alone and in the batch: only the truth tells."""

    def serve(op: str, inputs: Inputs) -> Made:
        out, lse = served(op, inputs)
        return out * 1.05, lse

    found = found_wrong("large-batch", op, serve)
    assert {"against float64" in one.what for one in found} == {True}
    assert all("of the error budget" in str(one.problem) for one in found)


@pytest.mark.parametrize("least", [0, len(check_rows.lengths_of(True))], ids=["always", "in large batches"])
def test_a_sum_over_rows_that_is_wrong_is_found(least: int) -> None:
    def serve(op: str, inputs: Inputs) -> Made:
        seeds = inputs["seeds"]
        return served(op, {**inputs, "seeds": Spoil.apply(seeds, 1) if rows_of(inputs) >= least else seeds})

    found = found_wrong("large-batch", "pma_pooling", serve)
    assert {one.quantity for one in found} == {"dseeds"}
    assert any(one.what == "sums over rows against float64" for one in found)
    assert any("rows against float64" in one.what and one.what[0].isdigit() for one in found) == (least == 0)


def counted(change: Callable[[int, Tensor], Tensor]) -> Serve:
    """What a call returns depends on how many there were."""
    calls = iter(range(10**6))

    def serve(op: str, inputs: Inputs) -> Made:
        out, lse = served(op, inputs)
        return change(next(calls), out), lse

    return serve


@pytest.mark.parametrize("op", OPS)
def test_runs_that_differ_are_found(op: str) -> None:
    found = found_wrong("large-batch", op, counted(lambda call, out: out + 1e-3 * call))
    assert any(one.what == "two runs" for one in found)
    beside = found_wrong("side-stream", op, counted(lambda call, out: out + 1e-3 * call))
    assert {one.what for one in beside} == {"beside a busy stream"}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stale", ["offsets", "numbers", "replay"])
def test_what_a_graph_keeps_of_its_first_contents_is_found(
    op: str, stale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths read on the host, numbers that were copied, a replay that does nothing: each is right the first time."""
    known: dict[int, Inputs] = {}

    def serve(op: str, inputs: Inputs) -> Made:
        name = {
            "offsets": "kv_offsets" if "kv_offsets" in inputs else "offsets",
            "numbers": "x" if "x" in inputs else "k",
        }
        kept = known.setdefault(
            inputs["grad_out"].data_ptr(), {n: x.detach().clone() for n, x in inputs.items() if isinstance(x, Tensor)}
        )
        changed = name[stale]
        x = inputs[changed]
        first = kept[changed]
        return served(op, {**inputs, changed: x + (first - x).detach() if x.requires_grad else first})

    if stale == "replay":
        monkeypatch.setattr(check_calls, "capture_graph", lambda run, place: (lambda: None, run()))
        serve = served
    found = found_wrong("graph-replay", op, serve)
    assert {one.what for one in found} >= {f"replay on contents {number}" for number in (1, 2, 3)}


@pytest.mark.parametrize("waits", [False, True])
def test_a_call_that_waits_for_the_default_stream_is_found(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    fake = gpu_stand_in.install(monkeypatch)

    def serve(op: str, inputs: Inputs) -> Made:
        if waits:
            torch.cuda.synchronize()
        return served(op, inputs)

    found = found_wrong("side-stream", "pma_pooling", serve, gpu_stand_in.Stand())
    assert {one.what for one in found} == ({"beside a busy stream: waits for nobody"} if waits else set())
    assert fake.asked.count("sleep") == 2
    order = [what for what in fake.asked if what in ("sleep", "begin Stream", "wait for a side stream")]
    assert order[:4] == ["begin Stream", "sleep", "begin Stream", "wait for a side stream"]


def with_index(name: str, change: Callable[[Tensor], Tensor]) -> Serve:
    """One index argument is read in another way."""

    def serve(op: str, inputs: Inputs) -> Made:
        x = inputs[name]
        return served(op, {**inputs, name: tuple(map(change, x)) if isinstance(x, tuple) else change(x)})

    return serve


INDICES = [
    *(("jagged_attention", name) for name in ("offsets", "kv_offsets", "rope_positions")),
    *(("gated_cross_attention", name) for name in ("q_offsets", "kv_offsets")),
    *(("apply_rotary", name) for name in ("offsets", "positions")),
    *((op, "offsets") for op in ("pma_pooling", "personalized_ffn")),
]


@pytest.mark.parametrize(("op", "name"), INDICES)
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda x: x.as_strided((len(x),), (1,)), "strided"),
        (lambda x: x.as_strided((len(x),), x.stride(), 0), "odd place"),
        (lambda x: x if x.dtype == torch.int64 else x.clamp(max=7), "int32"),
    ],
    ids=["stride", "storage offset", "int32"],
)
def test_views_of_indices_that_are_read_wrong_are_found(
    op: str, name: str, fault: Callable[[Tensor], Tensor], told: str
) -> None:
    interformer_kernels.set_validation("off")  # a GPU trusts them
    found = found_wrong("index-views", op, with_index(name, fault))
    assert found
    assert all(one.what.startswith(f"{name} ") and told in one.what for one in found)


@pytest.mark.parametrize("op", OPS)
def test_a_base_that_is_rounded_down_is_found(op: str) -> None:
    def aligned(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.storage_offset() != 1:
            return x
        return x + (x.as_strided(x.shape, x.stride(), 0) - x).detach()

    found = found_wrong("misaligned", op, lambda op, inputs: served(op, {n: aligned(x) for n, x in inputs.items()}))
    assert {one.what for one in found} == {"misaligned, 16 channels"}


@pytest.mark.parametrize("op", OPS)
def test_validation_that_lets_bad_offsets_pass_is_found(op: str) -> None:
    good: list[Tensor] = []

    def mended(x: Tensor) -> Tensor:
        good.append(x)
        return good[0]

    name = "kv_offsets" if op == "gated_cross_attention" else "offsets"
    found = found_wrong("full-validation", op, with_index(name, mended))
    assert {one.problem for one in found} == {"no error"}
    assert {one.what for one in found} == {
        f"offsets {how}" for how in ("out of order", "beyond the tokens", "negative")
    }
    assert interformer_kernels.set_validation("default") == "default"


def test_an_error_that_does_not_name_the_offsets_is_found() -> None:
    def serve(op: str, inputs: Inputs) -> Made:
        try:
            return served(op, inputs)
        except ValueError:
            raise ValueError("something is wrong") from None

    assert len(found_wrong("full-validation", "apply_rotary", serve)) == 3


@pytest.mark.parametrize("op", OPS)
def test_autocast_that_is_not_minded_is_found(op: str) -> None:
    def serve(op: str, inputs: Inputs) -> Made:
        if not torch.is_autocast_enabled("cpu"):
            return served(op, inputs)
        with torch.autocast("cpu", enabled=False):
            out, lse = served(op, inputs)
        return out.bfloat16(), lse

    (found,) = found_wrong("autocast", op, serve)
    assert found.what == "autocast to bfloat16"


@pytest.mark.parametrize("op", ["pma_pooling", "personalized_ffn"])
@pytest.mark.parametrize("how", ["wrong", "fails"])
def test_compiled_calls_that_go_wrong_are_found(op: str, how: str) -> None:
    def serve(op: str, inputs: Inputs) -> Made:
        out, lse = served(op, inputs)
        if torch.compiler.is_compiling():
            if how == "fails":
                torch._dynamo.graph_break()
            out = out * 1.05
        return out, lse

    found = found_wrong("compile", op, serve)
    assert len(found) == 2
    assert all((one.problem or "").startswith("failed: ") == (how == "fails") for one in found)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("row", [1, 11])
def test_places_that_wrap_around_at_an_end_are_found(op: str, row: int) -> None:
    (found,) = found_wrong("beyond-int32", op, spoiled_out(row, 12))
    assert found.row == row
    assert found.quantity == "out"


def test_tensors_that_do_not_fit_are_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = gpu_stand_in.install(monkeypatch)
    fake.memory = (-6 * 2**30, 0)
    (found,) = ask("beyond-int32", "pma_pooling", place=gpu_stand_in.Stand(tiny=False))
    assert found.ok is None
    assert "needs 64 GiB of memory, found 0 free" in str(found.problem)


# ---------------------------------------------------------------- bits


def test_bits_are_compared_and_the_first_difference_is_told() -> None:
    x = torch.randn(7, 2, 3)
    assert difference(x, x.clone()) == (None, 0)
    y = x.clone()
    y[4, 1, 2] += 1
    y[6, 0, 0] = torch.nan
    assert difference(y, x) == ((4, 1, 2), 2)
    assert difference(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -0.0])) == ((1,), 1)
    assert difference(y.mT, y.mT.contiguous()) == (None, 0)  # NaN, too
    assert difference(torch.empty(0, 3), torch.empty(0, 3)) == (None, 0)
    assert difference(torch.tensor(1.0), torch.tensor(2.0)) == ((), 1)
    found = same_bits("x", torch.float32, {"out": y}, {"out": x}, (3, 0, 4))
    assert (found.ok, found.quantity, found.index, found.row) == (False, "out", (4, 1, 2), 2)
    assert same_bits("x", torch.float32, {"out": x}, {"out": x.double()}).ok is False
    assert same_bits("x", torch.float32, {"out": x}, {"out": x[:6]}).ok is False
    assert (row_at(3, 7, (3, 0, 4)), row_at(2, 3, (3, 0, 4)), row_at(0, 5, (3, 0, 4))) == (2, 2, None)


def test_differences_are_found_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interformer_bench.check_context._COMPARED_AT_ONCE", 4)
    x = torch.zeros(3, 5, dtype=torch.bfloat16)
    y = x.clone()
    y[1, 4] = y[2, 1] = 1
    assert difference(x, y) == ((1, 4), 2)


def test_too_few_numbers_are_not_judged() -> None:
    from interformer_bench.check_context import within_budget

    few, many = torch.randn(8), torch.randn(2000)
    found = within_budget("x", torch.float32, {"out": few}, {"out": few}, {"out": few.double() + 1})
    assert found.ok is None
    found = within_budget("x", torch.float32, {"out": many}, {"out": many}, {"out": many.double() + 1})
    assert found.ok is True  # eager errs as much
    assert within_budget("x", torch.float32, {"out": many + 9}, {"out": many}, {"out": many.double()}).ok is False


# ---------------------------------------------------------------- the command


def test_the_list_tells_every_check_of_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_checks.main(["--list"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == len(gpu_checks.KINDS) * len(OPS)
    assert found[0] == {"name": f"large-batch.{OPS[0]}", "part": 1, "seconds": 12, "kind": "check"}
    assert [one["part"] for one in found] == sorted(one["part"] for one in found)


def test_findings_are_lines_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.jsonl"
    chosen = ["--results", str(file), "--device", "cpu", "--tiny", "--backend", "cuda"]
    assert gpu_checks.main(["--only", "index-views.pma_pooling", "--only", "autocast", *chosen]) == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert {one["step"] for one in found} == {"index-views.pma_pooling", *(f"autocast.{op}" for op in OPS)}
    assert all(one["ok"] and one["kind"] == "check" and one["backend"] == "cuda" and one["tiny"] for one in found)

    def faulty(place: Place, op: str, backend: str) -> CheckContext:
        return CheckContext(place, op, backend, counted(lambda call, out: out + call))

    monkeypatch.setattr(CheckContext, "of", faulty)
    assert gpu_checks.main(["--only", "side-stream.apply_rotary", *chosen]) == 1
    last = json.loads(file.read_text().splitlines()[-1])
    assert (last["ok"], last["what"], last["quantity"], last["device"]) == (False, "beside a busy stream", "out", "cpu")


def test_a_check_that_raises_is_a_finding_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(op: str, inputs: Inputs) -> Made:
        if op == "pma_pooling":
            raise RuntimeError("an illegal memory access was encountered")
        return served(op, inputs)

    monkeypatch.setattr(CheckContext, "of", lambda place, op, backend: CheckContext(place, op, backend, raising))
    file = tmp_path / "results.jsonl"
    chosen = ["--results", str(file), "--device", "cpu", "--tiny", "--backend", "triton"]
    assert gpu_checks.main(["--only", "side-stream", *chosen]) == 1
    found = [json.loads(line) for line in file.read_text().splitlines()]
    (wrong,) = (one for one in found if not one["ok"])
    assert (wrong["step"], wrong["what"]) == ("side-stream.pma_pooling", "runs")
    assert wrong["problem"] == "failed: RuntimeError: an illegal memory access was encountered"
    assert {one["step"] for one in found} == {f"side-stream.{op}" for op in OPS}


def test_a_lost_gpu_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "is_lost", lambda self: True)
    file = tmp_path / "results.jsonl"
    assert gpu_checks.main(["--only", "side-stream", "--results", str(file), "--device", "cpu", "--tiny"]) == 1
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert found[-1]["kind"] == "failed"
    assert {one["step"] for one in found} == {f"side-stream.{OPS[0]}"}


def test_a_backend_that_cannot_serve_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interformer_kernels._backend.unsupported_reason", lambda *_: "it was not built")
    written: list[dict[str, Any]] = []
    assert not gpu_checks.check(
        "side-stream.pma_pooling", CheckContext(PLACE, "pma_pooling", "cuda", served), written.append
    )
    assert [(one["ok"], one["problem"]) for one in written] == [(False, "cannot serve: it was not built")]


@pytest.mark.parametrize("arguments", [["--only", "nothing", "--results", "x"], []])
def test_what_cannot_be_asked_is_said_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_checks.main(arguments)
    assert stopped.value.code == 2
