"""The checks for a GPU, on CPU kernels at tiny sizes: they pass, and every planted fault is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_stand_in
import pytest
import torch
from gpu_faults import OPS, Outputs, Serve, ask, counted, served, wrong_findings
from interformer_bench import check_calls, check_model, check_rows, gpu_checks
from interformer_bench.check_context import Inputs
from torch import Tensor

import interformer_kernels


@pytest.mark.parametrize("name", gpu_checks.NAMES)
def test_nothing_is_found_on_the_cpu(name: str) -> None:
    findings = ask(*name.split("."))
    assert findings
    assert [finding for finding in findings if finding.ok is not True] == []


# ---------------------------------------------------------------- planted faults


class Spoil(torch.autograd.Function):
    """The identity, but one place of the gradient is wrong."""

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
    """The place in the output where row `row` begins: its index, or its first token."""
    return row if op in ("pma_pooling", "gated_cross_attention", "jagged_weighted_sum") else int(inputs["offsets"][row])


def of_tokens(inputs: Inputs) -> str:
    """An input that every row's own tokens have."""
    return next(name for name in ("x", "k", "v", "scores") if name in inputs)


def spoiled_out(row: int, min_rows: int) -> Serve:
    """An implementation whose row `row` has one slightly larger number, in batches of `least` rows and more."""

    def serve(op: str, inputs: Inputs) -> Outputs:
        out, lse = served(op, inputs)
        if rows_of(inputs) >= min_rows:
            change = torch.zeros_like(out)
            change[place_of_row(op, inputs, row)] = 0.05
            out = out + change
        return out, lse

    return serve


def spoiled_gradient(row: int, min_rows: int) -> Serve:
    """A wrong gradient of x, k, v or scores at the first token of row `row`, in batches of `least` rows and more."""

    def serve(op: str, inputs: Inputs) -> Outputs:
        if rows_of(inputs) < min_rows:
            return served(op, inputs)
        name = of_tokens(inputs)
        offsets = inputs["kv_offsets"] if "kv_offsets" in inputs else inputs["offsets"]
        return served(op, {**inputs, name: Spoil.apply(inputs[name], int(offsets[row]))})

    return serve


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("spoil", [spoiled_out, spoiled_gradient])
def test_a_row_that_differs_in_a_large_batch_is_found_and_named(op: str, spoil: Callable[[int, int], Serve]) -> None:
    row = 7  # the long one
    findings = wrong_findings("large-batch", op, spoil(row, len(check_rows.lengths_of(True))))
    kinds = {finding.what.partition(",")[0] for finding in findings}
    assert {"slices of the batch", "rows alone"} <= kinds
    for finding in findings:
        if finding.what.startswith(("slices", "rows alone")):
            assert finding.row == row
            assert finding.quantity in ("out", "dx", "dk", "dv", "dscores")
            assert finding.index is not None
            assert finding.differing > 0
    if spoil is spoiled_out:
        assert any("against float64" in kind for kind in kinds)


@pytest.mark.parametrize("op", OPS)
def test_rows_that_are_wrong_wherever_they_are_are_found(op: str) -> None:
    """The same wrong bits alone and in the batch: only a comparison with float64 finds them."""

    def serve(op: str, inputs: Inputs) -> Outputs:
        out, lse = served(op, inputs)
        return out * 1.05, lse

    findings = wrong_findings("large-batch", op, serve)
    assert {"against float64" in finding.what for finding in findings} == {True}
    assert all("of the error budget" in str(finding.problem) for finding in findings)


@pytest.mark.parametrize("min_rows", [0, len(check_rows.lengths_of(True))], ids=["always", "in large batches"])
def test_a_sum_over_rows_that_is_wrong_is_found(min_rows: int) -> None:
    def serve(op: str, inputs: Inputs) -> Outputs:
        seeds = inputs["seeds"]
        return served(op, {**inputs, "seeds": Spoil.apply(seeds, 1) if rows_of(inputs) >= min_rows else seeds})

    findings = wrong_findings("large-batch", "pma_pooling", serve)
    assert {finding.quantity for finding in findings} == {"dseeds"}
    assert any(finding.what == "sums over rows against float64" for finding in findings)
    assert any("rows against float64" in finding.what and finding.what[0].isdigit() for finding in findings) == (
        min_rows == 0
    )


@pytest.mark.parametrize("op", OPS)
def test_runs_that_differ_are_found(op: str) -> None:
    findings = wrong_findings("large-batch", op, counted(lambda call, out: out + 1e-3 * call))
    assert any(finding.what == "two runs" for finding in findings)
    beside = wrong_findings("side-stream", op, counted(lambda call, out: out + 1e-3 * call))
    assert {finding.what for finding in beside} == {"beside a busy stream"}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stale", ["offsets", "numbers", "replay"])
def test_what_a_graph_keeps_of_its_first_contents_is_found(
    op: str, stale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths read on the host, copied numbers, a replay that does nothing: each is right the first time."""
    first_contents: dict[int, Inputs] = {}

    def serve(op: str, inputs: Inputs) -> Outputs:
        name = {
            "offsets": "kv_offsets" if "kv_offsets" in inputs else "offsets",
            "numbers": of_tokens(inputs),
        }
        contents = first_contents.setdefault(
            inputs["grad_out"].data_ptr(), {n: x.detach().clone() for n, x in inputs.items() if isinstance(x, Tensor)}
        )
        changed = name[stale]
        x = inputs[changed]
        first = contents[changed]
        return served(op, {**inputs, changed: x + (first - x).detach() if x.requires_grad else first})

    if stale == "replay":
        monkeypatch.setattr(check_calls, "capture_graph", lambda run, place: (lambda: None, run()))
        serve = served
    findings = wrong_findings("graph-replay", op, serve)
    assert {finding.what for finding in findings} >= {f"replay on contents {number}" for number in (1, 2, 3)}


@pytest.mark.parametrize("stale", ["batch", "replay"])
def test_what_a_captured_step_keeps_of_its_first_batch_is_found(stale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training_step = check_model.training_step

    def stale_step(model: Any, batch: Any) -> Callable[[], Tensor]:
        return training_step(model, batch.with_capacity(len(batch.sequences)) if stale == "batch" else batch)

    def capture(step: Callable[[], Tensor], place: Any) -> tuple[Callable[[], Any], Tensor]:
        return step if stale != "replay" else lambda: None, step()

    monkeypatch.setattr(check_model, "training_step", stale_step)
    monkeypatch.setattr(check_model, "capture_graph", capture)
    found = {finding.what for finding in wrong_findings("graph-step", check_model.OP, served)}
    trains, right = ({f"replay on batch {number}{end}" for number in (0, 1, 2)} for end in (" trains", ""))
    assert found >= (trains if stale != "batch" else right - {"replay on batch 0"})


@pytest.mark.parametrize("waits", [False, True])
def test_a_call_that_waits_for_the_default_stream_is_found(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    fake = gpu_stand_in.install(monkeypatch)

    def serve(op: str, inputs: Inputs) -> Outputs:
        if waits:
            torch.cuda.synchronize()
        return served(op, inputs)

    findings = wrong_findings("side-stream", "pma_pooling", serve, gpu_stand_in.Stand())
    assert {finding.what for finding in findings} == ({"beside a busy stream: waits for nobody"} if waits else set())
    assert fake.requests.count("sleep") == 2
    order = [request for request in fake.requests if request in ("sleep", "begin Stream", "wait for a side stream")]
    assert order[:4] == ["begin Stream", "sleep", "begin Stream", "wait for a side stream"]


def with_index(name: str, change: Callable[[Tensor], Tensor]) -> Serve:
    """An implementation that reads one index argument in another way."""

    def serve(op: str, inputs: Inputs) -> Outputs:
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
    ("fault", "view"),
    [
        (lambda x: x.as_strided((len(x),), (1,)), "strided"),
        (lambda x: x.as_strided((len(x),), x.stride(), 0), "odd place"),
        (lambda x: x if x.dtype == torch.int64 else x.clamp(max=7), "int32"),
    ],
    ids=["stride", "storage offset", "int32"],
)
def test_views_of_indices_that_are_read_wrong_are_found(
    op: str, name: str, fault: Callable[[Tensor], Tensor], view: str
) -> None:
    interformer_kernels.set_validation("off")  # a GPU trusts them
    findings = wrong_findings("index-views", op, with_index(name, fault))
    assert findings
    assert all(finding.what.startswith(f"{name} ") and view in finding.what for finding in findings)


@pytest.mark.parametrize("op", OPS)
def test_a_base_that_is_rounded_down_is_found(op: str) -> None:
    def aligned(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.storage_offset() != 1:
            return x
        return x + (x.as_strided(x.shape, x.stride(), 0) - x).detach()

    findings = wrong_findings(
        "misaligned", op, lambda op, inputs: served(op, {n: aligned(x) for n, x in inputs.items()})
    )
    assert {finding.what for finding in findings} == {"misaligned, 16 channels"}


@pytest.mark.parametrize("op", OPS)
def test_validation_that_lets_bad_offsets_pass_is_found(op: str) -> None:
    good: list[Tensor] = []

    def mended(x: Tensor) -> Tensor:
        good.append(x)
        return good[0]

    name = "kv_offsets" if op == "gated_cross_attention" else "offsets"
    findings = wrong_findings("full-validation", op, with_index(name, mended))
    assert {finding.problem for finding in findings} == {"no error"}
    assert {finding.what for finding in findings} == {
        f"offsets {fault}" for fault in ("out of order", "beyond the tokens", "negative")
    }
    assert interformer_kernels.set_validation("default") == "default"


def test_an_error_that_does_not_name_the_offsets_is_found() -> None:
    def serve(op: str, inputs: Inputs) -> Outputs:
        try:
            return served(op, inputs)
        except ValueError:
            raise ValueError("something is wrong") from None

    assert len(wrong_findings("full-validation", "apply_rotary", serve)) == 3


@pytest.mark.parametrize("op", OPS)
def test_autocast_that_is_not_minded_is_found(op: str) -> None:
    def serve(op: str, inputs: Inputs) -> Outputs:
        if not torch.is_autocast_enabled("cpu"):
            return served(op, inputs)
        with torch.autocast("cpu", enabled=False):
            out, lse = served(op, inputs)
        return out.bfloat16(), lse

    (finding,) = wrong_findings("autocast", op, serve)
    assert finding.what == "autocast to bfloat16"


@pytest.mark.parametrize("op", ["pma_pooling", "personalized_ffn"])
@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_compiled_calls_that_go_wrong_are_found(op: str, fault: str) -> None:
    def serve(op: str, inputs: Inputs) -> Outputs:
        out, lse = served(op, inputs)
        if torch.compiler.is_compiling():
            if fault == "fails":
                torch._dynamo.graph_break()
            out = out * 1.05
        return out, lse

    findings = wrong_findings("compile", op, serve)
    assert len(findings) == 2
    assert all((finding.problem or "").startswith("failed: ") == (fault == "fails") for finding in findings)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("row", [1, 11])
def test_places_that_wrap_around_at_an_end_are_found(op: str, row: int) -> None:
    (finding,) = wrong_findings("beyond-int32", op, spoiled_out(row, 12))
    assert finding.row == row
    assert finding.quantity == "out"


def test_tensors_that_do_not_fit_are_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = gpu_stand_in.install(monkeypatch)
    fake.memory = (-6 * 2**30, 0)
    (finding,) = ask("beyond-int32", "pma_pooling", place=gpu_stand_in.Stand(tiny=False))
    assert finding.ok is None
    assert "needs 64 GiB of memory, found 0 free" in str(finding.problem)
