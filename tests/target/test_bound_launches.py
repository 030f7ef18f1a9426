"""A kernel that is launched past Triton's own way is the very one that Triton would take, with the same arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import fake_triton_driver
import pytest
import torch
import triton
import triton.language as tl
from grid import GPU_DTYPES
from torch import Tensor
from triton import knobs

from interformer_kernels._triton import _bound
from interformer_kernels._triton._tiles import Tiles

DRIVER = fake_triton_driver.install("sm_90")
TILES = Tiles(16, 16, warps=1, stages=1)


class Operand(NamedTuple):
    """A tensor with its strides, as the package's kernels take them."""

    pointer: Any
    row: Any
    column: Any


class Constants(NamedTuple):
    """Options that are compiled in."""

    name: str
    doubled: bool


@triton.jit(do_not_specialize=["rows", "tokens"])
def _scaled(x, other, out, rows, tokens, scale, NAMES: tl.constexpr, SIZE: tl.constexpr):
    b = tl.load(x.pointer + x.row * rows + x.column * tokens).to(tl.float32)
    if other is not None:
        b += tl.load(other.pointer + other.row)
    tl.store(out, b * scale.pointer)


@triton.jit
def _of_a_specialised_size(out, tokens):
    tl.store(out, tokens)


def of(dtype: torch.dtype, start: int = 0) -> Tensor:
    """A tensor that begins `start` numbers behind a multiple of 16 bytes."""
    return torch.zeros(64, dtype=dtype)[start:]


def arguments(
    x: Tensor | None = None, out: Tensor | None = None, row: int = 3, column: int = 1, other: Operand | None = None,
    rows: int = 5, tokens: int = 5, scale: Any = 1.0, last: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `_scaled`."""
    x, out = of(torch.float32) if x is None else x, of(torch.float32) if out is None else out
    return Operand(x, row, column), other, out, rows, tokens, Operand(scale, None, last)


STRIDES = (0, 1, 2, 15, 16, 17, 18, 32, 33, 2**31 - 1, 2**31, 2**31 + 1, 2**40)
SIZES = (-(2**31) - 1, -1, 0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**31 + 16, 2**62)


def dtypes() -> Iterator[tuple[Any, ...]]:
    """Every dtype, and parameters and empty tensors like others."""
    for x, out in itertools.product(GPU_DTYPES, repeat=2):
        yield arguments(of(x), of(out))
    yield arguments(torch.nn.Parameter(of(torch.float32)))
    yield arguments(out=torch.empty(0))


def starts() -> Iterator[tuple[Any, ...]]:
    """Tensors at multiples of 16 bytes and elsewhere."""
    for first, second in itertools.product((0, 1, 4, 8), repeat=2):
        yield arguments(of(torch.bfloat16, first), of(torch.float32, second))


def strides() -> Iterator[tuple[Any, ...]]:
    """Strides of all kinds, and large ones."""
    for stride in STRIDES:
        yield arguments(row=stride)
        yield arguments(row=16, column=stride)


def sizes() -> Iterator[tuple[Any, ...]]:
    """Flat integers, which Triton tells apart by their width alone."""
    for rows, tokens in itertools.product(SIZES, repeat=2):
        yield arguments(rows=rows, tokens=tokens)


def kinds() -> Iterator[tuple[Any, ...]]:
    """None and numbers of several kinds in one place."""
    others = (
        Operand(of(torch.float32), 1, of(torch.float32)),
        Operand(of(torch.float32), 1, of(torch.bfloat16, 1)),
        None,
        Operand(of(torch.float32), 1, 2),
        Operand(of(torch.float32), 1, 1),
        Operand(of(torch.float32), 2, 1),
    )
    for other, scale, last in itertools.product(others, (1.0, 0.5, 1, 16, 3, True), (None, 1)):
        yield arguments(other=other, scale=scale, last=last)


CALLS = {calls.__name__: calls for calls in (dtypes, starts, strides, sizes, kinds)}
CONSTANTS = [{"NAMES": Constants("a", False), "SIZE": 4}, {"SIZE": 4, "NAMES": Constants("b", True)}]


@pytest.fixture(autouse=True)
def nothing_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test begins without bound kernels."""
    monkeypatch.setattr(_bound, "_bound", {})


def launch(given: tuple[Any, ...], constants: dict[str, Any], *shared: Any) -> None:
    """Launch seven programs by the package's way; `shared` are what is known to calls alike, and the launch's form."""
    _bound.launch(_scaled, 7, given, constants, TILES, *shared)


def launch_by_triton(given: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """The same by Triton's."""
    _scaled[(7,)](*given, **constants, **TILES.options)


def latest() -> tuple[Any, ...]:
    """The latest launch: kernel, grid, stream, function, metadata and arguments, without hooks and their metadata."""
    kernel, given = DRIVER.latest
    return kernel, given[:6], tuple(x if isinstance(x, tuple) else id(x) for x in given[9:])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_the_kernel_is_the_one_that_triton_takes(calls: Any) -> None:
    """Whatever was launched before."""
    for given, constants in itertools.product(calls(), CONSTANTS):
        launch(given, constants)
        launch(given, constants)
        found = latest()
        launch_by_triton(given, constants)
        assert found == latest(), (given, constants)


def test_triton_is_passed_from_the_second_launch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that change from batch to batch make no difference."""
    launch(arguments(), CONSTANTS[0])
    monkeypatch.setattr(_scaled, "run", None)
    before = DRIVER.launches
    for rows, tokens in ((5, 5), (1, 1), (16, 2**31 - 1)):
        launch(arguments(rows=rows, tokens=tokens), CONSTANTS[0])
    assert DRIVER.launches == before + 3
    with pytest.raises(TypeError):  # Triton's own way, which was taken away
        launch(arguments(rows=2**31), CONSTANTS[0])


def test_calls_alike_need_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third launch of a form at the latest finds its kernel without a look at its arguments."""
    known: _bound.Known = {}
    for form, constants in enumerate(CONSTANTS):
        for _ in range(2):
            launch(arguments(), constants, known, (form,))
    kernels = []
    monkeypatch.setattr(_bound, "key_of", None)
    for form, constants in enumerate(CONSTANTS):
        launch(arguments(rows=7), constants, known, (form,))
        kernels.append(latest()[0])
        launch_by_triton(arguments(rows=7), constants)
        assert kernels[-1] == latest()[0]
    assert kernels[0] != kernels[1]
    with pytest.raises(TypeError):
        launch(arguments(), CONSTANTS[0], known, ("another form",))


def test_sizes_that_are_specialised_go_tritons_way() -> None:
    """The key has the width of flat integers alone: a kernel that is compiled for more is not kept."""
    for tokens in (1, 16, 17):
        _bound.launch(_of_a_specialised_size, 1, (of(torch.int64), tokens), {}, TILES)
        found = latest()
        _of_a_specialised_size[(1,)](of(torch.int64), tokens, **TILES.options)
        assert found[0] == latest()[0]
    assert not _bound._bound


def test_every_device_has_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function was loaded on one device, and is of no use on another."""
    loaded, load = [], DRIVER.utils.load_binary

    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        loaded.append(device)
        return 1, 100 + device, *load(name, kernel, shared, device)[2:]

    monkeypatch.setattr(DRIVER.utils, "load_binary", load_binary)
    functions = []
    for device in (2, 3, 2, 3):
        monkeypatch.setattr(DRIVER, "get_current_device", lambda device=device: device)
        launch(arguments(), CONSTANTS[0])
        functions.append(latest()[1][4])
    assert loaded == [2, 3]
    assert functions == [102, 103, 102, 103]


def test_who_watches_sees_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of launches are called, also of a kernel that is bound, and settings for debugging compile it anew."""
    launch(arguments(), CONSTANTS[0])
    launch(arguments(), CONSTANTS[0])
    plain, seen = latest()[0], []
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        with monkeypatch.context() as context:
            context.setattr(hook, "calls", [seen.append])
            launch(arguments(), CONSTANTS[0])
            # The driver's launcher calls hooks; the one of the tests is handed them.
            assert hook in DRIVER.latest[1][7:9]
    _scaled.add_pre_run_hook(lambda *args, **kwargs: seen.append(args))
    launch(arguments(), CONSTANTS[0])
    _scaled.pre_run_hooks.clear()
    assert len(seen) == 1
    with monkeypatch.context() as context:
        context.setattr(knobs.runtime, "debug", True)
        launch(arguments(), CONSTANTS[0])
        assert latest()[0] != plain
    launch(arguments(), CONSTANTS[0])
    assert latest()[0] == plain


def test_an_unknown_triton_launches_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version's launcher may take other arguments."""
    monkeypatch.setattr(_bound, "_SERVES", False)
    for _ in range(2):
        launch(arguments(), CONSTANTS[0])
    assert not _bound._bound
