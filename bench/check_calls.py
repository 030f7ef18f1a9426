"""Ways to call an op on a GPU that the grid of small calls does not cover; each must give a plain call's results."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from interformer_bench.check_context import (
    DTYPES,
    CheckContext,
    Finding,
    Inputs,
    dtype_name,
    eager_and_truth,
    random_lengths,
    same_bits,
    within_budget,
)
from interformer_bench.checks import error_line
from interformer_bench.gpu_place import capture_graph
from torch import Tensor

import interformer_kernels
from interformer_kernels import testing

# Index arguments by name: offsets and positions (a pair of tensors where queries and keys have their own).
_OFFSETS = ("offsets", "kv_offsets", "q_offsets")
_INDICES = (*_OFFSETS, "positions", "rope_positions")
_SPIN_CYCLES = 10**9  # about half a second


def mixed_lengths(context: CheckContext, seed: int = 0) -> list[int]:
    """A batch of moderate size: short rows, an empty one, and one that is split. The seed permutes the rows."""
    lengths = [*random_lengths(8, 1, 12), 0, 40] if context.place.tiny else [*random_lengths(250, 1, 200), 0, 1500]
    random.Random(seed).shuffle(lengths)
    return lengths


# ---------------------------------------------------------------- graphs and streams


def graph_replay(context: CheckContext) -> Iterator[Finding]:
    """A call in a CUDA graph, forward and backward, replayed on other contents and lengths in the same tensors."""
    for dtype in DTYPES:
        contents = [context.draw(context.case(mixed_lengths(context, seed)), dtype, seed) for seed in range(4)]
        static = _clone(contents[0])
        replay, outputs = capture_graph(lambda: context.run(static), context.place)  # noqa: B023
        for number in (1, 2, 3, 0):
            _fill(static, contents[number])
            replay()
            replayed = {name: x.clone() for name, x in outputs.items()}
            lengths = mixed_lengths(context, number)
            yield same_bits(f"replay on contents {number}", dtype, replayed, context.run(contents[number]), lengths)


def _clone(inputs: Inputs) -> dict[str, Any]:
    """New tensors with the same contents."""
    return {
        name: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


def _fill(static: Inputs, contents: Inputs) -> None:
    with torch.no_grad():
        for name, x in contents.items():
            if isinstance(x, Tensor):
                static[name].copy_(x)


def side_stream(context: CheckContext) -> Iterator[Finding]:
    """Calls on a side stream while the default one is busy: they neither wait for it nor run on it."""
    gpu = context.place.gpu
    for dtype in DTYPES:
        lengths = mixed_lengths(context)
        inputs = context.draw(context.case(lengths), dtype)
        expected = context.run(inputs)
        stream = torch.cuda.Stream() if gpu else None
        with context.place.stream(stream):  # a first call may load or compile
            context.run(inputs)
        if gpu:
            torch.cuda.synchronize()
            torch.cuda._sleep(_SPIN_CYCLES)
        with context.place.stream(stream):
            actual = {name: x.clone() for name, x in context.run(inputs).items()}
        if stream is not None:
            stream.synchronize()
            waited = torch.cuda.default_stream().query()
            problem = "the default stream was idle again when the call was done" if waited else None
            yield Finding("beside a busy stream: waits for nobody", dtype_name(dtype), not waited, problem)
        yield same_bits("beside a busy stream", dtype, actual, expected, lengths)
        if gpu:
            torch.cuda.synchronize()


# ---------------------------------------------------------------- arguments


def index_views(context: CheckContext) -> Iterator[Finding]:
    """Offsets and positions as int32 and int64, with a stride, at an odd storage offset: the same bits.

    Each index argument is changed alone, so that one that is read right does not hide another.
    """
    inputs = context.draw(_with_all_indices(context), DTYPES[0])
    for dtype in DTYPES:
        arguments = testing.cast_inputs(inputs, dtype)
        expected = context.run(arguments)
        for name in _INDICES:
            for kind in (torch.int32, torch.int64) if arguments.get(name) is not None else ():
                for view_name, view in _VIEWS.items():
                    x = arguments[name]
                    changed = tuple(view(y.to(kind)) for y in x) if isinstance(x, tuple) else view(x.to(kind))
                    actual = context.run({**arguments, name: changed})
                    yield same_bits(f"{name} {dtype_name(kind)}, {view_name}", dtype, actual, expected)


def _with_all_indices(context: CheckContext) -> testing.Case:
    """A call with every index argument of the op."""
    lengths = mixed_lengths(context)
    return context.case(lengths, **context.spec.index_options(lengths))


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


def misaligned(context: CheckContext) -> Iterator[Finding]:
    """Tensors that begin one number after an aligned address, in wide heads: right by the error budget.

    The bits may differ: narrower loads may add numbers in another order.
    """
    lengths = mixed_lengths(context)
    for size in (16,) if context.place.tiny else (64, 128):
        for dtype in DTYPES:
            case = context.case(lengths, head_size=size, value_size=size, gate="full")
            plain = context.draw(case, dtype)
            moved = {name: _misaligned(x) if isinstance(x, Tensor) else x for name, x in plain.items()}
            eager, truth = eager_and_truth(context.op, plain)
            yield within_budget(f"misaligned, {size} channels", dtype, context.run(moved), eager, truth)


def _misaligned(x: Tensor) -> Tensor:
    """A copy that begins one number after the start of its memory; indices are returned as they are."""
    if not x.is_floating_point():
        return x
    storage = x.new_empty(x.numel() + 1)
    copy = storage[1:].view(x.shape)
    with torch.no_grad():
        copy.copy_(x)
    return copy.detach().requires_grad_(x.requires_grad)


# ---------------------------------------------------------------- modes of calling


def full_validation(context: CheckContext) -> Iterator[Finding]:
    """Under full validation: the same bits, and offsets out of order or beyond the tokens raise ValueError."""
    lengths, dtype = mixed_lengths(context), DTYPES[0]
    inputs = context.draw(context.case(lengths), dtype)
    expected = context.run(inputs)
    (name,) = (name for name in _OFFSETS if isinstance(inputs.get(name), Tensor))
    previous = interformer_kernels.set_validation("full")
    try:
        yield same_bits("offsets checked", dtype, context.run(inputs), expected, lengths)
        for fault, index, value in (("out of order", 1, 10**6), ("beyond the tokens", -1, 10**6), ("negative", 1, -1)):
            bad = inputs[name].clone()
            bad[index] = value
            try:
                context.run({**inputs, name: bad})
            except ValueError as error:
                ok = name in str(error)
                yield Finding(
                    f"offsets {fault}", dtype_name(dtype), ok, None if ok else f"the error names none: {error}"
                )
            else:
                yield Finding(f"offsets {fault}", dtype_name(dtype), False, "no error")
    finally:
        interformer_kernels.set_validation(previous)


def autocast(context: CheckContext) -> Iterator[Finding]:
    """float32 arguments under autocast: the results of a call in bfloat16, with gradients cast back."""
    lengths = mixed_lengths(context)
    inputs = context.draw(context.case(lengths), torch.float32)
    narrow = testing.cast_inputs(inputs, torch.bfloat16)
    device = context.place.device

    def run(arguments: Inputs) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(device, dtype=torch.bfloat16):
            return context.serve(context.op, arguments)

    arguments = {**inputs, "grad_out": narrow["grad_out"]}
    actual = testing.evaluate(lambda: run(arguments), context.op, arguments)
    expected = {name: x.float() if name.startswith("d") else x for name, x in context.run(narrow).items()}
    yield same_bits("autocast to bfloat16", torch.bfloat16, actual, expected, lengths)


def compiled(context: CheckContext) -> Iterator[Finding]:
    """`torch.compile` of a model around the call, by inductor: within the error budget, forward and backward.

    Rehearsals do without inductor, whose results depend on the machine's compiler.
    """
    backend = "aot_eager" if context.place.tiny else "inductor"
    torch.compiler.reset()  # drop the compilations of other ops

    @torch.compile(fullgraph=True, backend=backend)
    def model(arguments: Inputs) -> tuple[Tensor, Tensor | None]:
        return context.serve(context.op, arguments)

    lengths = mixed_lengths(context)
    for dtype in DTYPES:
        inputs = context.draw(context.case(lengths), dtype)
        arguments = {name: x for name, x in inputs.items() if name != "grad_out"}
        title = f"compiled by {backend}"
        try:
            actual = testing.evaluate(lambda: model(arguments), context.op, inputs)  # noqa: B023
        except Exception as error:
            yield Finding(title, dtype_name(dtype), False, f"failed: {error_line(error)}")
            continue
        eager, truth = eager_and_truth(context.op, inputs)
        yield within_budget(title, dtype, actual, eager, truth)
