"""The ops as the compiler and PyTorch's tools see them: schemas, fakes, opcheck, torch.compile, FLOP counts."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from grid import ALL_CASES, backends, case_ids
from recorded import Recorder, all_ops_at_once, recorded_calls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import interformer_kernels as ik
from interformer_kernels import _backend, _calls, testing
from interformer_kernels.ops import _autograd, _public
from interformer_kernels.testing import Case, offsets_of

OPCHECKED = [case for op in testing.OPS for case in testing.cases(op) if case.name in {
    "plain", "gate and residual", "grouped heads, strided", "score silu", "no rows", "no tokens", "v is k",
    "jagged queries", "mask causal", "rotary on some channels, positions", "halves", "interleaved, rope",
    "gelu, bias, residual", "gradient of lse",
}]  # fmt: skip


def on_backends(cases: list[Case]) -> pytest.MarkDecorator:
    pairs = [(backend, case) for case in cases for backend in backends(case.op)]
    ids = [f"{b}-{i}" for (b, _), i in zip(pairs, case_ids([c for _, c in pairs]), strict=True)]
    return pytest.mark.parametrize(("backend", "case"), pairs, ids=ids)


@on_backends(OPCHECKED)
def test_opcheck(backend: str, case: Case) -> None:
    """All of opcheck's utilities on both registered halves."""
    for func, args in recorded_calls(case, backend):
        clean = tuple(x.nan_to_num(0.5) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
        torch.library.opcheck(func, clean)


@on_backends(ALL_CASES)
def test_fake_outputs_match_real_ones(backend: str, case: Case) -> None:
    """Shapes, dtypes and strides promised to the compiler are those that come."""
    for func, args in recorded_calls(case, backend):
        real = func(*args)
        with FakeTensorMode() as mode:
            fake = func(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args))
        pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (real, fake)), strict=True)
        for found, promised in pairs:
            assert found.shape == promised.shape
            assert found.dtype == promised.dtype
            assert found.numel() == 0 or found.stride() == promised.stride()


@pytest.mark.parametrize("op", testing.OPS)
def test_signatures_agree(op: str) -> None:
    """The public function, the schema and the kernels' modules name the arguments of the op's declaration."""
    public = _public.ALL[op]
    spec = public.spec
    registered = _autograd.OPS[spec.name]
    for half, names in ((registered.forward_op, spec.forward_names), (registered.backward_op, spec.backward_names)):
        assert tuple(argument.name for argument in half._schema.arguments) == names
    assert spec.names == spec.call._fields
    expanded = {"rope": ["cos", "sin"], "window": ["window_left", "window_right"]}
    expanded |= {"rope_positions": ["positions_q", "positions_k"], "times": ["times_q", "times_k"]}
    parameters = inspect.signature(getattr(ik, op)).parameters
    named = {field for name in parameters for field in expanded.get(name, [name])}
    assert named - {"return_lse", "backend", "residual", "kv_rows"} <= set(map(public.named, spec.names)) | {
        "kv_offsets"
    }
    assert ("residual" in parameters) == spec.has_residual
    for backend in backends(op):
        kernels = _backend.kernels(spec.name, op, backend, "cpu", torch.float32)
        if kernels is not None:
            others = [name for name in ("residual", "keep_attn_out") if name in spec.forward_names]
            assert list(inspect.signature(kernels.forward).parameters) == ["call", *others]
            given = {"grad_out", *(["grad_lse"] if spec.has_lse else []), *spec.saved}
            assert set(inspect.signature(kernels.backward).parameters) == {"call", *given}


@pytest.mark.skipif("cpu" not in backends("jagged_attention"), reason="needs the native module")
def test_the_native_module_reads_the_declared_fields() -> None:
    from interformer_kernels import _C

    fields = _C.fields()
    tuples = {name: x._fields for name, x in vars(_calls).items() if hasattr(x, "_fields") and x is not _calls.Field}
    assert {name: tuple(names) for name, names in fields.items()} == tuples


def test_an_unknown_public_op_is_refused() -> None:
    rotate = torch.ops.interformer_kernels.apply_rotary_fwd
    x, table = torch.ones(2, 1, 2), torch.ones(2, 1)
    with pytest.raises(ValueError, match="apply_rotary: op must be one of apply_rotary; found 'pma_pooling'"):
        rotate(x, torch.tensor([0, 2]), table, table, None, False, "pma_pooling", "")


# ---------------------------------------------------------------- watchers
# A call that nobody watches goes past the dispatcher; a watcher sees both halves.


class _FunctionNames(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def _pooled_and_back() -> None:
    x = torch.randn(5, 2, 4, requires_grad=True)
    ik.pma_pooling(x[:2], x, None, offsets_of((2, 3))).sum().backward()


def test_a_profiler_sees_both_halves() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _pooled_and_back()
    seen = {event.key for event in profile.key_averages()}
    assert {"interformer_kernels::attention_fwd", "interformer_kernels::attention_bwd"} <= seen


def test_a_dispatch_mode_sees_both_halves() -> None:
    with Recorder() as recorder:
        _pooled_and_back()
    assert [str(func) for func, _ in recorder.calls] == [
        "interformer_kernels.attention_fwd.default",
        "interformer_kernels.attention_bwd.default",
    ]


def test_a_function_mode_sees_the_forward() -> None:
    with _FunctionNames() as mode, torch.no_grad():
        _pooled()
    assert "interformer_kernels.attention_fwd.default" in mode.names


def _pooled() -> Tensor:
    x = torch.ones(5, 2, 4)
    return ik.pma_pooling(x[:2], x, None, offsets_of((2, 3)))


def test_a_tracer_sees_the_forward() -> None:
    x, offsets = torch.randn(5, 2, 4), offsets_of((2, 3))
    traced = torch.jit.trace(lambda x: ik.pma_pooling(x[:2], x, None, offsets), (x,), check_trace=False)
    assert "interformer_kernels::attention_fwd" in str(traced.graph)


# ---------------------------------------------------------------- torch.compile


INDUCTOR = pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_compile_fullgraph_dynamic_without_recompiles(backend: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(all_ops_at_once, fullgraph=True, dynamic=True, backend=counter)
    rope = testing.rotary_tables(64, 4)
    weight = torch.randn(8, 8, requires_grad=True)
    frames = []
    # The first sizes differ from all others in sight: the compiler takes equal sizes for one symbol.
    for lengths in ((5, 6), (7, 2, 9), (4, 4, 4, 4), (11, 2), (30, 1, 5, 2, 8), (3, 0, 2)):
        x = torch.randn(sum(lengths), 8, requires_grad=True)
        offsets = offsets_of(lengths)
        wanted = torch.autograd.grad(all_ops_at_once(x, weight, offsets, rope), (x, weight))
        found = torch.autograd.grad(compiled(x, weight, offsets, rope), (x, weight))
        torch.testing.assert_close(found, wanted)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * len(frames), "recompiled after warm-up"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", testing.OPS)
def test_compile_every_op_alone(op: str, dtype: torch.dtype) -> None:
    """With a gate in one dtype, without in the other, where the backward's needs follow from the backend."""
    torch._dynamo.reset()
    gate = "full" if op != "personalized_ffn" and dtype == torch.float32 else ""
    case = Case(op, "", gate=gate, residual=op != "apply_rotary", rope=4, tail=0)
    inputs = testing.make_inputs(case, dtype)
    compiled = torch.compile(getattr(ik, op), fullgraph=True, dynamic=True, backend="aot_eager")
    arguments = {name: x for name, x in inputs.items() if name != "grad_out"}
    leaves = [inputs[n] for n in testing.DIFFERENTIABLE[op] if inputs.get(n) is not None]
    found = torch.autograd.grad(compiled(**arguments), leaves, inputs["grad_out"])
    wanted = torch.autograd.grad(getattr(ik, op)(**arguments), leaves, inputs["grad_out"])
    torch.testing.assert_close(found, wanted)


# ---------------------------------------------------------------- FLOPs


def test_flops_are_counted() -> None:
    lengths = (3, 0, 5)
    q, v = torch.randn(8, 2, 4, requires_grad=True), torch.randn(8, 2, 6)
    offsets, pairs = offsets_of(lengths), 9 + 25
    with FlopCounterMode(display=False) as counter:
        out = ik.jagged_attention(q, q, v, offsets)
    assert counter.get_total_flops() == 2 * pairs * 2 * (4 + 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * pairs * 2 * (4 + 6)
    seeds = torch.randn(3, 2, 4)
    with FlopCounterMode(display=False) as counter:
        ik.pma_pooling(seeds, q, v, offsets)
        ik.gated_cross_attention(torch.randn(3, 3, 2, 4), q, v, offsets)
    assert counter.get_total_flops() == 2 * (2 * 3 * 8 * 2 * (4 + 6))
    with FlopCounterMode(display=False) as counter:
        ik.personalized_ffn(q[:, 0], torch.randn(3, 4, 7), offsets)
        ik.apply_rotary(q, offsets, testing.rotary_tables(8, 4))
    assert counter.get_total_flops() == 2 * 8 * 4 * 7 + 8 * 2 * 2 * 6


# Forks after the one import of torch, which takes seconds; each first count is a child's.
FIRST_COUNT = """
import os, sys
import torch, interformer_kernels as ik
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
q, offsets = torch.randn(8, 2, 4), torch.tensor([0, 3, 3, 8])

class Call(torch.nn.Module):
    def forward(self, q, offsets):
        return ik.jagged_attention(q, q, q, offsets, backend="reference")

ways = {
    "public": Call,
    "bare": lambda: lambda q, offsets: torch.ops.interformer_kernels.attention_fwd(
        "shared", q[:1], q, q, None, offsets, None, "multiply", "sigmoid", 1.0, "softmax", 1.0,
        False, -1, -1, 0, "full", 0, None, 0.0, None, None, False, False, None, None, None, None, 0.0, None,
        0, None, None, None, None, False, None, False, "pma_pooling", "reference",
    ),
    "compiled": lambda: torch.compile(Call(), backend="eager"),
    "exported": lambda: torch.export.export(Call(), (q, offsets)).module(),
}
for words in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        way, mode = words.split()
        run = ways[way]()
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            with torch.inference_mode(mode == "inference"):
                run(q, offsets)
        print(words, counter.get_total_flops(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, words
"""
WAYS, MODES = ("public", "bare", "exported", "compiled"), ("gradients", "inference")


def test_the_first_count_of_a_process_is_right() -> None:
    """The formulas are there before the first counter is made, though nobody imported its module for them."""
    asked = [f"{way} {mode}" for way in WAYS for mode in MODES]
    done = subprocess.run([sys.executable, "-c", FIRST_COUNT, *asked], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    wanted = [f"{words} {2 * 8 * 2 * 8 if words.startswith('bare') else 2 * 34 * 2 * 8}" for words in asked]
    assert done.stdout.splitlines() == wanted


def test_formulas_are_registered_where_the_counter_came_first() -> None:
    code = "import torch.utils.flop_counter as c, interformer_kernels; "
    code += "print(len([op for op in c.flop_registry if 'interformer' in str(op)]))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "10\n"
