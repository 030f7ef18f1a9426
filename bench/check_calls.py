"""Ways to call an op on a GPU that the grid of small calls does not take: each must give what a plain call gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from interformer_bench.check_ground import (
    DTYPES,
    Finding,
    Ground,
    Inputs,
    by_definition,
    drawn,
    name_of,
    same_bits,
    within_budget,
)
from interformer_bench.gpu_place import captured, told
from torch import Tensor

import interformer_kernels
from interformer_kernels import testing

# Index arguments, by name: offsets and positions (a pair of them, where queries and keys have their own).
_OFFSETS = ("offsets", "kv_offsets", "q_offsets")
_INDICES = (*_OFFSETS, "positions", "rope_positions")
_SPIN = 10**9  # cycles: about half a second


def middling(ground: Ground, seed: int = 0) -> list[int]:
    """A batch of some work: short rows, an empty one, one that is cut into chunks. Permuted by the seed."""
    found = [*drawn(8, 1, 12), 0, 40] if ground.place.tiny else [*drawn(250, 1, 200), 0, 1500]
    random.Random(seed).shuffle(found)
    return found


# ---------------------------------------------------------------- when it runs


def graph_replay(ground: Ground) -> Iterator[Finding]:
    """A call in a CUDA graph, forward and backward, replayed on other numbers and other lengths in the same tensors."""
    for dtype in DTYPES:
        contents = [ground.draw(ground.case(middling(ground, seed)), dtype, seed) for seed in range(4)]
        static = _copied(contents[0])
        replay, kept = captured(lambda: ground.run(static), ground.place)  # noqa: B023
        for number in (1, 2, 3, 0):
            _fill(static, contents[number])
            replay()
            found = {name: x.clone() for name, x in kept.items()}
            lengths = middling(ground, number)
            yield same_bits(f"replay on contents {number}", dtype, found, ground.run(contents[number]), lengths)


def _copied(inputs: Inputs) -> dict[str, Any]:
    """Tensors of their own with the same contents."""
    return {
        name: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


def _fill(static: Inputs, contents: Inputs) -> None:
    with torch.no_grad():
        for name, x in contents.items():
            if isinstance(x, Tensor):
                static[name].copy_(x)


def side_stream(ground: Ground) -> Iterator[Finding]:
    """Calls on a stream of their own while the default one is busy: they neither wait for it nor run on it."""
    gpu = ground.place.gpu
    for dtype in DTYPES:
        lengths = middling(ground)
        inputs = ground.draw(ground.case(lengths), dtype)
        wanted = ground.run(inputs)
        stream = torch.cuda.Stream() if gpu else None
        with ground.place.stream(stream):  # once before: it may load or compile
            ground.run(inputs)
        if gpu:
            torch.cuda.synchronize()
            torch.cuda._sleep(_SPIN)
        with ground.place.stream(stream):
            found = {name: x.clone() for name, x in ground.run(inputs).items()}
        if stream is not None:
            stream.synchronize()
            waited = torch.cuda.default_stream().query()
            problem = "the default stream was idle again when the call was done" if waited else None
            yield Finding("beside a busy stream: waits for nobody", name_of(dtype), not waited, problem)
        yield same_bits("beside a busy stream", dtype, found, wanted, lengths)
        if gpu:
            torch.cuda.synchronize()


# ---------------------------------------------------------------- what it is given


def index_views(ground: Ground) -> Iterator[Finding]:
    """Offsets and positions as int32 and int64, with a stride, at an odd place of their memory: the same bits.

    Each alone, so that one that is read right does not hide another.
    """
    inputs = ground.draw(_with_all_indices(ground), DTYPES[0])
    for dtype in DTYPES:
        arguments = testing.cast_inputs(inputs, dtype)
        wanted = ground.run(arguments)
        for name in _INDICES:
            for kind in (torch.int32, torch.int64) if arguments.get(name) is not None else ():
                for what, view in _VIEWS.items():
                    x = arguments[name]
                    changed = tuple(view(y.to(kind)) for y in x) if isinstance(x, tuple) else view(x.to(kind))
                    found = ground.run({**arguments, name: changed})
                    yield same_bits(f"{name} {name_of(kind)}, {what}", dtype, found, wanted)


def _with_all_indices(ground: Ground) -> testing.Case:
    """A call with every index argument that the op takes."""
    lengths = middling(ground)
    own = {"query_lengths": tuple(reversed(lengths))}
    more: dict[str, dict[str, Any]] = {
        "jagged_attention": {**own, "rope": 32, "positions": True},
        "gated_cross_attention": own,
        "apply_rotary": {"positions": True},
    }
    return ground.case(lengths, **more.get(ground.op, {}))


def _with_stride(x: Tensor) -> Tensor:
    wide = x.new_full((len(x), 2), -7)
    wide[:, 0] = x
    return wide[:, 0]


def _at_odd_place(x: Tensor) -> Tensor:
    longer = x.new_full((len(x) + 2,), -7)
    longer[1:-1] = x
    return longer[1:-1]


_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "strided": _with_stride,
    "at an odd place": _at_odd_place,
    "strided, at an odd place": lambda x: _at_odd_place(x.repeat_interleave(2))[::2],
}


def misaligned(ground: Ground) -> Iterator[Finding]:
    """Tensors that begin one number behind a boundary of memory, in wide heads: right by the error budget.

    Not the same bits: who reads fewer numbers at once may add them in another order.
    """
    lengths = middling(ground)
    for size in (16,) if ground.place.tiny else (64, 128):
        for dtype in DTYPES:
            case = ground.case(lengths, head_size=size, value_size=size, gate="full")
            plain = ground.draw(case, dtype)
            moved = {name: _moved(x) if isinstance(x, Tensor) else x for name, x in plain.items()}
            eager, truth = by_definition(ground.op, plain)
            yield within_budget(f"misaligned, {size} channels", dtype, ground.run(moved), eager, truth)


def _moved(x: Tensor) -> Tensor:
    """The same, one number further on in memory of its own; indices stay."""
    if not x.is_floating_point():
        return x
    room = x.new_empty(x.numel() + 1)
    there = room[1:].view(x.shape)
    with torch.no_grad():
        there.copy_(x)
    return there.detach().requires_grad_(x.requires_grad)


# ---------------------------------------------------------------- how it is called


def full_validation(ground: Ground) -> Iterator[Finding]:
    """With contents checked: the same bits, and offsets out of order or beyond the tokens raise ValueError."""
    lengths, dtype = middling(ground), DTYPES[0]
    inputs = ground.draw(ground.case(lengths), dtype)
    wanted = ground.run(inputs)
    (name,) = (name for name in _OFFSETS if isinstance(inputs.get(name), Tensor))
    previous = interformer_kernels.set_validation("full")
    try:
        yield same_bits("offsets checked", dtype, ground.run(inputs), wanted, lengths)
        for what, place, value in (("out of order", 1, 10**6), ("beyond the tokens", -1, 10**6), ("negative", 1, -1)):
            bad = inputs[name].clone()
            bad[place] = value
            try:
                ground.run({**inputs, name: bad})
            except ValueError as error:
                ok = name in str(error)
                yield Finding(f"offsets {what}", name_of(dtype), ok, None if ok else f"the error names none: {error}")
            else:
                yield Finding(f"offsets {what}", name_of(dtype), False, "no error")
    finally:
        interformer_kernels.set_validation(previous)


def autocast(ground: Ground) -> Iterator[Finding]:
    """float32 arguments under autocast: what the call makes of them cast to bfloat16, and gradients cast back."""
    lengths = middling(ground)
    inputs = ground.draw(ground.case(lengths), torch.float32)
    narrow = testing.cast_inputs(inputs, torch.bfloat16)
    device = ground.place.device

    def run(arguments: Inputs) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(device, dtype=torch.bfloat16):
            return ground.serve(ground.op, arguments)

    given = {**inputs, "grad_out": narrow["grad_out"]}
    found = testing.evaluate(lambda: run(given), ground.op, given)
    wanted = ground.run(narrow)
    widened = {name: x.float() if name.startswith("d") else x for name, x in wanted.items()}
    yield same_bits("autocast to bfloat16", torch.bfloat16, found, widened, lengths)


def compiled(ground: Ground) -> Iterator[Finding]:
    """`torch.compile` of a model around the call, by inductor: within the error budget, forward and backward.

    In rehearsals without inductor's compiler: what it finds depends on the machine.
    """
    backend = "aot_eager" if ground.place.tiny else "inductor"
    torch.compiler.reset()  # of what other ops were compiled for

    @torch.compile(fullgraph=True, backend=backend)
    def around(arguments: Inputs) -> tuple[Tensor, Tensor | None]:
        return ground.serve(ground.op, arguments)

    lengths = middling(ground)
    for dtype in DTYPES:
        inputs = ground.draw(ground.case(lengths), dtype)
        arguments = {name: x for name, x in inputs.items() if name != "grad_out"}
        what = f"compiled by {backend}"
        try:
            found = testing.evaluate(lambda: around(arguments), ground.op, inputs)  # noqa: B023
        except Exception as error:
            yield Finding(what, name_of(dtype), False, f"failed: {told(error)}")
            continue
        eager, truth = by_definition(ground.op, inputs)
        yield within_budget(what, dtype, found, eager, truth)
