"""Ops called with DTensors in two processes: outputs and gradients are one process', and nothing is sent."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grid import ALL_CASES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from two_processes import WORLD, run_together

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels.testing import Case, offsets_of

ATTENTION = ("jagged_attention", "pma_pooling", "gated_cross_attention")
ONE_KEY_HEAD = [Case(op, "one key head", kv_heads=1, gate="head", residual=True) for op in ATTENTION]
HALF_GROUP = [Case(op, "three key heads", heads=12, kv_heads=3, gate="channel") for op in ATTENTION]
LINEAR = Case("personalized_ffn", "linear", bias=False)

HEADS = [case for case in (*ALL_CASES, *ONE_KEY_HEAD) if case.op != "personalized_ffn"]
ROWS = [replace(case, tail=4) for case in ALL_CASES]  # never as many tokens as rows: the test tells them by number
FEATURES = [case for case in ALL_CASES if case.op == "personalized_ffn"]
CHANNELS = [LINEAR]
CASES = {"heads": HEADS, "rows": ROWS, "features": FEATURES, "channels": CHANNELS}
KEYS = [(what, case) for what, cases in CASES.items() for case in cases]


def placement_of(what: str, case: Case, name: str, x: Tensor) -> Placement:
    """How an argument (or the output's gradient) lies where the two processes share out `what`."""
    if what == "rows":
        shared = name == "seeds" or (name == "gate" and case.gate in ("channel", "scalar"))
        return Replicate() if shared else Shard(0)
    if what == "features":
        return {"weight": Shard(2), "bias": Shard(1), "residual": Shard(1), "grad_out": Shard(1)}.get(name, Replicate())
    if what == "channels":
        return Shard(1) if name in ("x", "weight") else Replicate()
    whole = (name in ("k", "v") and case.kv_heads % WORLD) or (name == "gate" and case.gate == "scalar")
    return Replicate() if whole else Shard(x.dim() - 2)


def parts_of(case: Case, what: str, x: Tensor, axis: int) -> list[int]:
    """Sizes of the two processes' parts of an axis; the first has the first half of the rows, the second any tail."""
    if what != "rows":
        return [x.shape[axis] // WORLD] * WORLD
    first = len(case.lengths) // 2
    lengths = next(
        (n for n in (case.lengths, case.query_lengths) if n is not None and x.shape[axis] == sum(n) + case.tail),
        None,
    )
    count = first if lengths is None else sum(lengths[:first])
    return [count, x.shape[axis] - count]


class Shared:
    """A case's inputs as this process has them."""

    def __init__(self, what: str, case: Case) -> None:
        self.what, self.case = what, case
        self.mesh = init_device_mesh("cpu", (WORLD,))
        self.rank = self.mesh.get_local_rank()

    def own(self, x: Tensor, placement: Placement) -> Tensor:
        if not isinstance(placement, Shard):
            return x
        return x.split(parts_of(self.case, self.what, x, placement.dim), placement.dim)[self.rank]

    def shard(self, name: str, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(self.shard(name, part) for part in x)
        if not isinstance(x, Tensor) or name == "rope":
            return x
        if not x.is_floating_point():
            return self._shard_index(name, x)
        placement = placement_of(self.what, self.case, name, x)
        return self._made(self.own(x.detach(), placement), placement, x.shape).requires_grad_(x.requires_grad)

    def _shard_index(self, name: str, x: Tensor) -> Tensor:
        if self.what != "rows":
            return x
        if not name.endswith("offsets"):
            return self._made(self.own(x, Shard(0)), Shard(0), x.shape)
        first = len(self.case.lengths) // 2
        rows = slice(0, first + 1) if self.rank == 0 else slice(first, None)
        return self._made(x[rows] - x[rows][0], Shard(0), (len(x) + 1,))

    def _made(self, own: Tensor, placement: Placement, shape: Any) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(own, self.mesh, [placement], shape=torch.Size(shape), stride=stride)

    def check(self, name: str, found: DTensor, wanted: Tensor, placement: Placement) -> None:
        own = found.to_local()
        if placement == Partial():
            own = own.clone()
            dist.all_reduce(own)
        assert found.placements == (placement,), f"{name}: {found.placements}"
        assert found.shape == wanted.shape, name
        torch.testing.assert_close(own, self.own(wanted, placement), msg=lambda text: f"{name}: {text}")


def same_as_one_process(what: str, case: Case) -> str:
    """What differs from one process, or why it does not run; empty where all is well."""
    inputs = testing.make_inputs(case, torch.float32)
    wanted = testing.evaluate(lambda: testing.call(case.op, inputs, None), case.op, inputs)
    shared, found = Shared(what, case), {}

    def run() -> None:
        sharded = {name: shared.shard(name, x) for name, x in inputs.items()}
        with CommDebugMode() as sent:
            found.update(testing.evaluate(lambda: testing.call(case.op, sharded, None), case.op, sharded))
        assert sent.get_total_counts() == 0, sent.get_comm_counts()

    failures = [failure_of(run)] * WORLD
    dist.all_gather_object(failures, failures[0])
    if any(failures):  # before either process waits for the other
        return "".join(failures)
    output = placement_of(what, case, "grad_out", inputs["grad_out"])
    for name, x in found.items():
        placement = Partial() if what == "channels" else output
        if name.startswith("d"):
            placement = placement_of(what, case, name[1:], inputs[name[1:]])
            placement = Partial() if placement == Replicate() else placement
        failures.append(failure_of(partial(shared.check, name, x, wanted[name], placement)))
    return "".join(failures)


def name_of(what: str, case: Case) -> str:
    return f"{what}-{case.op}-{case.name}"


def failure_of(check: Callable[[], None]) -> str:
    """What goes wrong; empty where nothing does."""
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return ""


def every_case() -> dict[str, str]:
    return {name_of(what, case): same_as_one_process(what, case) for what, case in KEYS}


# ---------------------------------------------------------------- a layer under tensor parallelism

WIDTH, HIDDEN, HEADS_OF_LAYER, CONTEXT = 8, 12, 4, 6
LENGTHS = (3, 0, 7, 1)
NN_MODULE = partial(ik.nn.PersonalizedFFN, bias=False)


class Personalized(nn.Module):
    """The same as `nn.PersonalizedFFN` without bias, of packed rows alone: that asks its offsets for a tail."""

    def __init__(self, width: int, context: int, out: int) -> None:
        super().__init__()
        self.weight_proj = nn.Linear(context, width * out)
        self.sizes = width, out

    def forward(self, x: Tensor, context: Tensor, *, offsets: Tensor) -> Tensor:
        return ik.personalized_ffn(x, self.weight_proj(context).unflatten(1, self.sizes), offsets)


class Layer(nn.Module):
    """A Sequence Arch of two-layer personalised feed-forward and attention, its projections apart."""

    def __init__(self, personalized: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.into = nn.Linear(CONTEXT, HIDDEN * WIDTH)  # of each row's weights, the hidden axis first
        self.out_of = personalized(HIDDEN, CONTEXT, WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, tokens: Tensor, context: Tensor, offsets: Tensor) -> Tensor:
        normed = self.norm(tokens)
        into = self.into(context).unflatten(1, (HIDDEN, WIDTH)).transpose(1, 2)
        if isinstance(into, DTensor):
            normed = DTensor.from_local(normed, into.device_mesh, [Replicate()])
        hidden = ik.personalized_ffn(normed, into, offsets, activation="silu")
        tokens = tokens + self.out_of(hidden, context, offsets=offsets)
        heads = (part(tokens).unflatten(-1, (HEADS_OF_LAYER, -1)) for part in (self.query, self.key, self.value))
        return tokens + self.out(ik.jagged_attention(*heads, offsets, causal=True).flatten(-2))


def made_layer(personalized: Callable[..., nn.Module]) -> tuple[Layer, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randn(sum(LENGTHS), WIDTH, requires_grad=True)
    return Layer(personalized), (tokens, torch.randn(len(LENGTHS), CONTEXT), offsets_of(LENGTHS))


def results(layer: Layer, run: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Output and all gradients of one step."""
    out = run(*inputs)
    out.square().sum().backward()
    found = {"out": out.detach(), "tokens": inputs[0].grad}
    found.update({name: parameter.grad for name, parameter in layer.named_parameters()})
    inputs[0].grad = None
    layer.zero_grad()
    return found


def in_parallel(personalized: Callable[..., nn.Module]) -> tuple[Layer, tuple[Tensor, Tensor, Tensor]]:
    """The layer over the processes: heads, hidden units, and rows of the matrices that make weights."""
    layer, inputs = made_layer(personalized)
    by_columns = {name: ColwiseParallel(use_local_output=False) for name in ("into", "out_of.weight_proj")}
    by_columns.update({name: ColwiseParallel(use_local_output=False) for name in ("query", "key", "value")})
    summed = PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate())
    plan = {**by_columns, "out_of": summed, "out": RowwiseParallel()}
    return parallelize_module(layer, init_device_mesh("cpu", (WORLD,)), plan), inputs


def layer_in_parallel() -> tuple[dict[str, Tensor], list[str]]:
    """Output and gradients, and the names of what was sent."""
    layer, inputs = in_parallel(NN_MODULE)
    with CommDebugMode() as sent:
        found = results(layer, layer, inputs)
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}
    return whole, [str(collective) for collective in sent.get_comm_counts()]


def compiled_in_parallel() -> dict[str, Tensor]:
    layer, inputs = in_parallel(Personalized)
    found = results(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), inputs)
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


WORKS = (every_case, layer_in_parallel, compiled_in_parallel)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of `WORKS` returns in each of the processes."""
    return run_together(WORKS, tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize(("what", "case"), KEYS, ids=lambda x: str(getattr(x, "op", "")) + "-" + str(x))
def test_parts_are_those_of_one_process(together: list[dict[str, Any]], what: str, case: Case) -> None:
    for rank, found in enumerate(together):
        failure = found["every_case"][name_of(what, case)]
        assert not failure, f"process {rank}: {failure}"


def test_a_layer_in_parallel_sends_sums_alone(together: list[dict[str, Any]]) -> None:
    layer, inputs = made_layer(NN_MODULE)
    expected = results(layer, layer, inputs)
    for found, sent in (found["layer_in_parallel"] for found in together):
        assert sent == ["c10d_functional.all_reduce"]
        torch.testing.assert_close(found, expected)


def test_a_compiled_layer_in_parallel(together: list[dict[str, Any]]) -> None:
    layer, inputs = made_layer(Personalized)
    expected = results(layer, layer, inputs)
    for found in together:
        torch.testing.assert_close(found["compiled_in_parallel"], expected)
