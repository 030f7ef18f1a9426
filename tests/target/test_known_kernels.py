"""Launches of calls that are alike take their kernels by call and form: they are those of the launches' own keys."""

from __future__ import annotations

from typing import Any

import fake_triton_driver
import pytest
import torch
from cpu_calls import MEMORY_LAYOUTS
from grid import ALL_CASES, GPU_DTYPES, case_ids
from random_calls import laid_out_inputs

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels._triton import _bound, _programs, _run
from interformer_kernels.testing import Case

CASES = [case for case in ALL_CASES if "attention" in case.op or case.op == "pma_pooling"]
fake_triton_driver.install("sm_90")


class Keys:
    """Stands in for launches: a launch by call and form has the key of all others of that call and form."""

    def __init__(self) -> None:
        self.of_place: dict[tuple[Any, ...], Any] = {}
        self.known: list[Any] = []  # kept, so that ids remain their own
        self.again = 0

    def launch(
        self, kernel: Any, grid: int, arguments: tuple[Any, ...], constants: dict[str, Any], *tiles: int | Any
    ) -> None:
        *launched, known, form = tiles
        if known is not None:
            place = id(known), id(kernel), form
            key = *launched, *_bound.key_of(kernel, arguments, constants)
            self.known.append(known)
            self.again += place in self.of_place
            assert self.of_place.setdefault(place, key) == key, (kernel, form)


KEYS = Keys()


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are compared in place of launches, over all tests."""
    monkeypatch.setattr(_run, "launch", KEYS.launch)


def run(case: Case, dtype: torch.dtype, memory: str) -> None:
    """A call and its backward, and the call alone."""
    inputs = laid_out_inputs(case, dtype, 0, memory)
    testing.evaluate(lambda: testing.call(case.op, inputs, "triton"), case.op, inputs)
    with torch.no_grad():
        testing.call(case.op, inputs, "triton")


@pytest.mark.parametrize("many_rows", [_programs.MANY_ROWS, 0], ids=["searched", "listed"])
@pytest.mark.parametrize("case", CASES, ids=case_ids(CASES))
def test_calls_alike_launch_the_same_kernels(case: Case, many_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option, in every dtype, however the tensors lie in memory, with lists of tiles and without."""
    monkeypatch.setattr(_programs, "MANY_ROWS", many_rows)
    for dtype in GPU_DTYPES:
        for memory in ("", *MEMORY_LAYOUTS):
            run(case, dtype, memory)


def test_batches_share_what_is_known() -> None:
    """Numbers of rows and tokens, and calls in between, make no difference; options, alignment and dtypes do."""
    offsets = [testing.offsets_of(lengths) for lengths in ((5, 20), (40,), (9, 0, 60, 16), (5, 20))]
    known = []
    for i, bounds in enumerate(offsets):
        x = torch.randn(int(bounds[-1]) + (i == 3), 2, 16)[i == 3 :]
        before = len(KEYS.known)
        ik.jagged_attention(x, x, x, bounds, causal=i == 2, backend="triton")
        known += {id(each) for each in KEYS.known[before:]}
    assert known[0] == known[1] != known[2]
    assert known[3] == known[0]  # two heads of 16 channels further on, memory is aligned as before
    assert KEYS.again > 0


def test_sizes_of_64_bits_are_told_apart() -> None:
    """Kernels are compiled for the width of every size; such batches share nothing with others."""
    few, many, more = (_bound.known_to((None,), (1, tokens), "option") for tokens in (5, 2**31, 2**31 + 1))
    assert few is _bound.known_to((None,), (7, 2**31 - 1), "option")
    assert many is _bound.known_to((None,), (1, 2**31), "option")
    assert len({id(known) for known in (few, many, more)}) == 3
    assert few is not _bound.known_to((None,), (1, 5), "another option")
