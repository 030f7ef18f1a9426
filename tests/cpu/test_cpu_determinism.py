"""The CPU kernels: the same bits for any number of threads and in any batch, and memory-safe for any input."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cpu_calls import all_ops, broadcast_shapes, differing, layouts, name_of, replaced, results, truth
from torch import Tensor

import interformer_kernels
from interformer_kernels import _backend, testing
from interformer_kernels.ops import _autograd, _public
from interformer_kernels.testing import Case, make_inputs, offsets_of

pytest.importorskip("interformer_kernels._C", exc_type=ImportError)

# Enough work for three threads in every op, one row much longer than the others.
MANY = (*(1 + (i * 37) % 50 for i in range(150)), 400)
SIZES: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_size": 8, "value_size": 8}


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- any number of threads


def on_threads(counts: tuple[int, ...], op: str, inputs: dict[str, Any]) -> None:
    by_threads = []
    for threads in counts:
        torch.set_num_threads(threads)
        by_threads.append(results(op, inputs))
    for threads, of_threads in zip(counts[1:], by_threads[1:], strict=True):
        assert not differing(by_threads[0], of_threads), threads


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", all_ops(MANY, **SIZES), ids=name_of)
def test_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    on_threads((1, 2, 3, 7), case.op, make_inputs(case, dtype))


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("case", layouts(MANY, **SIZES), ids=name_of)
def test_gates_on_any_number_of_threads(case: Case) -> None:
    """A broadcast gate's gradient is summed over tokens, rows and heads that different threads hold."""
    inputs = make_inputs(case, torch.float32)
    for shape in broadcast_shapes(tuple(inputs["grad_out"].shape)):
        on_threads((1, 2, 3), case.op, {**inputs, "gate": torch.randn(shape, requires_grad=True)})


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (5, 9), "num_prefix": 2}], ids=str)
def test_masks_on_any_number_of_threads(options: dict[str, Any]) -> None:
    case = Case("jagged_attention", "", lengths=MANY, **SIZES, rope=8, gate="head", residual=True, options=options)
    on_threads((1, 2, 3), case.op, make_inputs(case, torch.float32))


def threads_woken(run: Callable[[], Any]) -> tuple[Any, int]:
    """Call `run` on a new thread that may use three; return its result and the number of OpenMP threads it created."""
    measured: list[Any] = []

    def measure() -> None:
        torch.set_num_threads(3)
        before = set(os.listdir("/proc/self/task"))  # threads of an earlier call may be about to end
        measured.append(run())
        measured.append(len(set(os.listdir("/proc/self/task")) - before))

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    return measured[0], measured[1]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("case", all_ops(MANY, **SIZES), ids=name_of)
def test_large_calls_take_threads_and_small_ones_none(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, the tests above might compare one thread with one thread."""
    # The short way of eager calls runs the same kernels, but not by these functions.
    monkeypatch.setattr(_autograd, "is_eager", lambda: False)
    # Filling memory with NaN would wake threads, too.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    woken: list[int] = []

    def counting(half: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            result, threads = threads_woken(lambda: half(*args, **kwargs))
            woken.append(threads)
            return result

        return counted

    kernels = _backend.kernels(_public.ALL[case.op].spec.name, case.op, "cpu", "cpu", torch.float32)
    for half in ("forward", "backward"):
        monkeypatch.setattr(kernels, half, counting(getattr(kernels, half)))
    for lengths, expected in ((MANY, [2, 2]), ((2, 1), [0, 0])):
        sized = {"lengths": lengths, "query_lengths": lengths if case.query_lengths else None}
        results(case.op, make_inputs(Case(**{**vars(case), **sized}), torch.float32))
        assert woken == expected
        woken.clear()


# ---------------------------------------------------------------- batch invariance


# The first axis of each argument, output or gradient. All rows share those that are not named.
KEYS, QUERIES, ROWS = "kv_offsets", "offsets", "rows"
ALONG: dict[str, dict[str, str]] = {
    "jagged_attention": {"q": QUERIES, "k": KEYS, "v": KEYS, "out": QUERIES, "lse": QUERIES},
    "gated_cross_attention": {"q": QUERIES, "k": KEYS, "v": KEYS, "out": QUERIES, "lse": QUERIES},
    "pma_pooling": {"k": KEYS, "v": KEYS, "out": ROWS, "lse": ROWS},
    "personalized_ffn": {"x": KEYS, "weight": ROWS, "bias": ROWS, "out": KEYS},
    "apply_rotary": {"x": KEYS, "positions": KEYS, "out": KEYS},
    "jagged_softmax": {"scores": KEYS, "out": KEYS},
    "jagged_weighted_sum": {"weights": KEYS, "v": KEYS, "out": ROWS},
}


def along(case: Case, name: str) -> str | None:
    """The first axis of an argument or result: ROWS, QUERIES or KEYS; None where all rows share it."""
    name = name.removeprefix("d") if name != "dense" else name
    if name in ("gate", "residual", "grad_out", "grad_lse"):
        name = "out"
    axis = ALONG[case.op].get(name)
    if axis == QUERIES and case.name == "dense":
        return ROWS
    return KEYS if axis == QUERIES and not case.query_lengths else axis


def rows_of(case: Case, name: str, x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The slices of an argument or result that belong to these rows, in their order."""
    axis = along(case, name)
    if axis is None:
        return x
    if axis == ROWS:
        return x[list(rows)]
    lengths = case.lengths if axis == KEYS else case.query_lengths
    assert lengths is not None
    by_row = x[: sum(lengths)].split(lengths)
    return torch.cat([by_row[row] for row in rows])


def batch_of(case: Case, inputs: dict[str, Any], rows: tuple[int, ...]) -> dict[str, Any]:
    """The inputs of a batch of these rows, in new memory."""
    batch = replaced(inputs, lambda name, x: rows_of(case, name, x, rows).clone())
    for name in ("grad_out", "grad_lse"):
        if name in inputs:
            batch[name] = rows_of(case, name, inputs[name], rows).clone()
    keys, queries = (
        None if lengths is None else offsets_of([lengths[row] for row in rows])
        for lengths in (case.lengths, case.query_lengths)
    )
    if case.op == "gated_cross_attention":
        return {**batch, "kv_offsets": keys, "q_offsets": queries}
    if queries is not None:
        return {**batch, "offsets": queries, "kv_offsets": keys}
    return {**batch, "offsets": keys}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(16, 16), (9, 11)], ids=str)
@pytest.mark.parametrize("layout", range(9))
def test_batch_invariance(layout: int, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Batch invariance: alone, first, last, next to very long rows, and in other memory, with odd channels too."""
    lengths = (37, 1, 300, 0, 65, 700, 64)
    shape = {"heads": 2, "kv_heads": 1, "head_size": sizes[0], "value_size": sizes[1], "tail": 0}
    case = all_ops(lengths, **shape)[layout]
    gated = {"gate": "full", "residual": True, "grad_lse": True}
    case = Case(**{**vars(case), **(gated if case.op.endswith(("attention", "pooling")) else {})})
    inputs = make_inputs(case, dtype)
    together = results(case.op, inputs)
    alone = [(row,) for row in range(len(lengths))]
    for rows in (*alone, tuple(reversed(range(len(lengths)))), (4, 5, 2), (5, 2, 4), (2, 4, 5), (0, 0, 0)):
        actual = results(case.op, batch_of(case, inputs, rows))
        for name, x in actual.items():
            if along(case, name) is not None:
                expected = rows_of(case, name, together[name], rows)
                assert not differing({name: x}, {name: expected}), (rows, name)


# ---------------------------------------------------------------- offsets and positions of any content


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", all_ops((5, 6, 9), head_size=8, value_size=8, tail=0), ids=name_of)
def test_offsets_of_any_content(case: Case, index: torch.dtype) -> None:
    """Rows are clamped to the tokens. Whatever overlaps, all outputs are written and nothing is read outside.

    Where no row shares a token with another, the result is that of the reference.
    """
    interformer_kernels.set_validation("off")
    inputs = make_inputs(case, torch.float32)
    names = [name for name in ("offsets", "kv_offsets", "q_offsets") if inputs.get(name) is not None]
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor([torch.iinfo(index).min, torch.iinfo(index).max, -1, 0, 5, 20, 19, 21])
    per_row = case.op == "pma_pooling" or case.name == "dense"  # rows that share keys have outputs of their own
    for draw in range(40):
        broken = dict(inputs)
        for name in names:
            drawn = extremes[torch.randint(8, (4,), generator=generator)]
            apart = torch.cat((extremes[:1], drawn[1:].sort()[0]))  # clamped, these begin at 0 and never decrease
            broken[name] = (apart if draw % 4 == 0 else drawn).to(index)
        if "rope" in inputs:  # a clamped row may be longer than the tables: places in them are clamped, too
            broken["positions"] = extremes[torch.randint(8, (20,), generator=generator)].to(index)
        actual = results(case.op, broken)
        for name, x in actual.items():
            assert not x.isnan().any(), (draw, name, broken)
            assert name == "lse" or x.isfinite().all(), (draw, name)
        if per_row or draw % 4 == 0:
            torch.testing.assert_close(actual["out"], truth(case.op, broken)["out"])


def test_rows_that_overlap_are_served_in_one_order() -> None:
    """The row that a shared token's output comes from must not depend on threads."""
    interformer_kernels.set_validation("off")
    for case in all_ops(MANY, **SIZES, tail=0):
        inputs = make_inputs(case, torch.float32)
        for name in ("offsets", "kv_offsets", "q_offsets"):
            if inputs.get(name) is not None:
                entries = inputs[name]
                inputs[name] = torch.cat((entries[:1], entries[1:].flip(0)[::3], entries[1:], entries[-1:] + 99))
                inputs[name] = inputs[name][: len(entries)]
        if "rope" in inputs:
            inputs["rope"] = testing.rotary_tables(sum(MANY), 6)
        try:
            on_threads((1, 3), case.op, inputs)
        finally:
            torch.set_num_threads(1)


def test_positions_of_any_content_are_clamped() -> None:
    interformer_kernels.set_validation("off")
    sizes = {"lengths": (5, 9), "rope": 6, "positions": True, "tail": 0, "head_size": 8, "value_size": 8}
    crossed = {"query_lengths": (4, 3)}
    for case in (Case("apply_rotary", "", **sizes), Case("jagged_attention", "", **sizes, **crossed)):
        inputs = make_inputs(case, torch.float32)
        name = "positions" if case.op == "apply_rotary" else "rope_positions"
        places = inputs[name] if isinstance(inputs[name], tuple) else (inputs[name],)
        for index in (torch.int32, torch.int64):
            wild = [x.index_fill(0, torch.tensor([0, 2]), torch.iinfo(index).max).to(index) for x in places]
            wild = [x.index_fill(0, torch.tensor([1]), torch.iinfo(index).min) for x in wild]
            tame = [x.clamp(0, 8) for x in wild]
            actual, expected = (
                results(case.op, {**inputs, name: tuple(xs) if len(xs) > 1 else xs[0]}) for xs in (wild, tame)
            )
            assert not differing(actual, expected)


# ---------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("case", all_ops((4, 70, 4), heads=2, kv_heads=2, head_size=8, value_size=8), ids=name_of)
def test_values_that_are_not_finite_spread_as_in_pytorch(case: Case, value: float) -> None:
    gated = {"gate": "full", "residual": True} if case.op.endswith(("attention", "pooling")) else {}
    inputs = make_inputs(Case(**{**vars(case), **gated}), torch.float64)
    for name in testing.DIFFERENTIABLE[case.op]:
        broken = replaced(inputs, lambda key, x, name=name: spoiled(x, value) if key == name else x)
        torch.testing.assert_close(
            results(case.op, broken), truth(case.op, broken), equal_nan=True, msg=lambda text, name=name: name + text
        )


def spoiled(x: Tensor, value: float) -> Tensor:
    """`x` with one number in the middle replaced."""
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1)[x[: (x.shape[0] + 1) // 2].numel() - 1] = value
    return x


@pytest.mark.parametrize("op", ["pma_pooling", "jagged_attention", "gated_cross_attention"])
def test_a_nan_stays_in_its_row_and_head(op: str) -> None:
    case = Case(op, "", lengths=(4, 70, 4), heads=2, kv_heads=2, head_size=8, tail=0)
    inputs = make_inputs(case, torch.float32)
    with torch.no_grad():
        inputs["k"][40, 1, 3] = torch.nan
    actual = results(op, inputs)
    row = slice(4, 74) if op == "jagged_attention" else slice(1, 2)
    for name, rows in (("out", row), ("lse", row), ("dk", slice(4, 74)), ("dv", slice(4, 74))):
        head = (..., 1) if name == "lse" else (..., 1, slice(None))
        assert actual[name][rows][head].isnan().all(), name
        assert actual[name].isnan().sum() == actual[name][rows][head].numel(), name


@pytest.mark.parametrize("pattern", ["first tile -inf", "one inf", "all -inf", "inf then nan", "one finite"])
@pytest.mark.parametrize("op", ["pma_pooling", "jagged_attention", "gated_cross_attention"])
def test_infinite_scores_as_in_pytorch(op: str, pattern: str) -> None:
    s = torch.randn(130)
    if pattern == "first tile -inf":
        s[:64] = -torch.inf
    elif pattern == "one inf":
        s[100] = torch.inf
    elif pattern == "inf then nan":
        s[3], s[100] = torch.inf, torch.nan
    else:
        s[:] = -torch.inf
        s[77] = 1.0 if pattern == "one finite" else -torch.inf
    v = torch.randn(130, 1, 4, requires_grad=True)
    tensors = {"k": s.view(130, 1, 1), "v": v, "scale": 1.0, "return_lse": True, "backend": "cpu"}
    if op == "pma_pooling":
        out, lse = interformer_kernels.pma_pooling(torch.ones(1, 1, 1), offsets=offsets_of((130,)), **tensors)
    elif op == "gated_cross_attention":
        q = torch.ones(1, 1, 1, 1)
        out, lse = interformer_kernels.gated_cross_attention(q, kv_offsets=offsets_of((130,)), **tensors)
    else:
        rows = {"offsets": offsets_of((1,)), "kv_offsets": offsets_of((130,))}
        out, lse = interformer_kernels.jagged_attention(torch.ones(1, 1, 1), **rows, **tensors)
    torch.testing.assert_close(out.view(4), torch.softmax(s, 0) @ v[:, 0], equal_nan=True)
    torch.testing.assert_close(lse.view(()), torch.logsumexp(s, 0), equal_nan=True)
    (grad_v,) = torch.autograd.grad(out, v, torch.ones_like(out))
    torch.testing.assert_close(grad_v[:, 0, 0], torch.softmax(s, 0), equal_nan=True)
