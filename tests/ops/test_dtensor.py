"""Ops called with DTensors in two processes: outputs and gradients are one process', and nothing is sent."""

from __future__ import annotations

import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
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

HEADS = [
    case
    for case in (*ALL_CASES, *ONE_KEY_HEAD)
    if case.op != "personalized_ffn"
    and not case.options.get("dropout_p")
    and (case.op in ATTENTION or case.heads % WORLD**2 == 0)
]
ROWS = [
    replace(case, tail=4) for case in ALL_CASES if not case.options.get("dropout_p") and case.kv_rows is None
]  # never as many tokens as rows: the test tells them by number
FEATURES = [case for case in ALL_CASES if case.op == "personalized_ffn"]
CHANNELS = [Case("personalized_ffn", "linear", bias=False)]

TABLES = ("sinks", "position_bias", "time_bias")
What = tuple[str, ...]  # what each dimension of a mesh shares out, each over two processes
LINE: list[tuple[What, Case]] = [
    ((what,), case)
    for what, cases in (("heads", HEADS), ("rows", ROWS), ("features", FEATURES), ("channels", CHANNELS))
    for case in cases
]
SQUARE: list[tuple[What, Case]] = [
    (what, replace(case, tail=4))
    for what in (("rows", "heads"), ("heads", "heads"))
    for case in HEADS[::9]
    if "rows" not in what or case.kv_rows is None
]
SQUARE += [(("features", "rows"), FEATURES[0]), (("rows", "channels"), CHANNELS[0])]


def placement_of(what: str, parts: int, case: Case, name: str, x: Tensor) -> Placement:
    """How an argument (or the output's gradient) lies where `parts` processes share out `what`."""
    if name in TABLES:
        return Shard(0) if what == "heads" and len(x) > 1 else Replicate()
    if what == "rows":
        shared = name == "seeds" or (name == "gate" and case.gate in ("channel", "heads", "scalar"))
        return Replicate() if shared else Shard(0)
    if what == "features":
        return {"weight": Shard(2), "bias": Shard(1), "residual": Shard(1), "grad_out": Shard(1)}.get(name, Replicate())
    if what == "channels":
        return Shard(1) if name in ("x", "weight") else Replicate()
    whole = (name in ("k", "v") and case.kv_heads % parts) or (name == "gate" and case.gate in ("token", "scalar"))
    has_channels = name not in ("scores", "weights", "grad_lse") and case.op != "jagged_softmax"
    return Replicate() if whole else Shard(x.dim() - (2 if has_channels else 1))


def halves_of(case: Case, what: str, x: Tensor, axis: int) -> list[int]:
    """Sizes of the two parts of an axis; the first has the first half of the rows, the second the rest and any tail."""
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

    def __init__(self, what: What, case: Case) -> None:
        self.what, self.case = what, case
        self.mesh = init_device_mesh("cpu", (WORLD,) * len(what))

    def placements(self, name: str, x: Tensor) -> list[Placement]:
        parts = {what: WORLD ** self.what.count(what) for what in self.what}
        return [placement_of(what, parts[what], self.case, name, x) for what in self.what]

    def own(self, x: Tensor, placements: Sequence[Placement]) -> Tensor:
        for dim, (what, placement) in enumerate(zip(self.what, placements, strict=True)):
            if isinstance(placement, Shard):
                halves = halves_of(self.case, what, x, placement.dim)
                x = x.split(halves, placement.dim)[self.mesh.get_local_rank(dim)]
        return x

    def shard(self, name: str, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(self.shard(name, part) for part in x)
        if not isinstance(x, Tensor) or name in ("rope", "time_edges"):
            return x
        if not x.is_floating_point():
            return self._shard_index(name, x)
        placements = self.placements(name, x)
        return self._made(self.own(x.detach(), placements), placements, x.shape).requires_grad_(x.requires_grad)

    def _shard_index(self, name: str, x: Tensor) -> Tensor:
        if "rows" not in self.what:
            return x
        placements = [Shard(0) if what == "rows" else Replicate() for what in self.what]
        if not name.endswith("offsets"):
            return self._made(self.own(x, placements), placements, x.shape)
        first = len(self.case.lengths) // 2
        own = x[: first + 1] if self.mesh.get_local_rank(self.what.index("rows")) == 0 else x[first:]
        return self._made(own - own[0], placements, (len(x) + 1,))

    def _made(self, own: Tensor, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
        stride = torch.empty(tuple(shape), device="meta").stride()
        return DTensor.from_local(own, self.mesh, placements, shape=torch.Size(shape), stride=stride)

    def check(self, name: str, found: DTensor, wanted: Tensor, placements: Sequence[Placement]) -> None:
        own = found.to_local().clone()
        for dim, placement in enumerate(placements):
            if placement == Partial():
                dist.all_reduce(own, group=self.mesh.get_group(dim))
        assert found.placements == tuple(placements), f"{name}: {found.placements}"
        assert found.shape == wanted.shape, name
        torch.testing.assert_close(own, self.own(wanted, placements), msg=lambda text: f"{name}: {text}")


def same_as_one_process(what: What, case: Case) -> str:
    """The differences from one process, or the reason why it does not run; empty where all is well."""
    inputs = testing.make_inputs(case, torch.float32)
    wanted = testing.evaluate(lambda: testing.call(case.op, inputs, None), case.op, inputs)
    shared, found = Shared(what, case), {}

    def run() -> None:
        sharded = {name: shared.shard(name, x) for name, x in inputs.items()}
        with CommDebugMode() as sent:
            found.update(testing.evaluate(lambda: testing.call(case.op, sharded, None), case.op, sharded))
        assert sent.get_total_counts() == 0, sent.get_comm_counts()

    failures = [failure_of(run)] * dist.get_world_size()
    dist.all_gather_object(failures, failures[0])
    if any(failures):  # before one process waits for another
        return "".join(failures)
    for name, x in found.items():
        placements = shared.placements("grad_out", inputs["grad_out"])
        if name.startswith("d"):
            placements = shared.placements(name[1:], inputs[name[1:]])
            placements = [Partial() if placement == Replicate() else placement for placement in placements]
        elif "channels" in what:
            placements[what.index("channels")] = Partial()
        failures.append(failure_of(partial(shared.check, name, x, wanted[name], placements)))
    return "".join(failures)


def name_of(what: What, case: Case) -> str:
    return f"{' x '.join(what)}-{case.op}-{case.name}"


def failure_of(check: Callable[[], None]) -> str:
    """The faults that were found; empty where there are none."""
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return ""


def on_a_line() -> dict[str, str]:
    return {name_of(what, case): same_as_one_process(what, case) for what, case in LINE}


def on_a_square() -> dict[str, str]:
    return {name_of(what, case): same_as_one_process(what, case) for what, case in SQUARE}


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
    tokens = torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64, requires_grad=True)
    context = torch.randn(len(LENGTHS), CONTEXT, dtype=torch.float64)
    return Layer(personalized).double(), (tokens, context, offsets_of(LENGTHS))


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


# ---------------------------------------------------------------- what is refused


def made_on_line(placement: Placement, *shape: int) -> DTensor:
    """A DTensor whose part in each process has this shape."""
    return DTensor.from_local(torch.randn(shape), init_device_mesh("cpu", (WORLD,)), [placement])


def refused_calls() -> dict[str, tuple[Callable[[], Any], str]]:
    """Calls that would need something to be sent, or that mix what cannot be mixed, and what is said of them."""
    whole, offsets, heads = Replicate(), offsets_of((2, 4)), made_on_line(Shard(1), 6, 2, 4)
    shared_offsets = DTensor.from_local(offsets_of((1, 2)), heads.device_mesh, [Shard(0)])
    tokens = made_on_line(Shard(0), 3, 2, 4)
    x, weight = made_on_line(Shard(1), 6, 4), made_on_line(Shard(1), 2, 4, 3)
    other = DTensor.from_local(torch.randn(6, 2, 4), init_device_mesh("cpu", (1, WORLD)), [whole, Shard(1)])

    def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor = offsets, **options: Any) -> Callable[[], Any]:
        return lambda: ik.jagged_attention(q, k, v, offsets, **options)

    def feed(**options: Any) -> Callable[[], Any]:
        return lambda: ik.personalized_ffn(x, weight, offsets, **options)

    uneven = DTensor.from_local(
        torch.randn(6, 1, 4), heads.device_mesh, [Shard(1)], shape=torch.Size((6, 3, 4)), stride=(12, 4, 1)
    )
    ragged = made_on_line(Shard(1), 6, 6, 4), made_on_line(whole, 6, 3, 4)
    at_rows = "on mesh dimension 0, each process' own beginning at 0, where rows are shared out; found q with"
    return {
        "plain keys": (attend(heads, torch.randn(6, 4, 4), heads), "k must be a DTensor, as q is, found a plain"),
        "plain queries": (attend(torch.randn(6, 4, 4), heads, heads), "q must be a DTensor where another argument"),
        "plain gate": (attend(heads, heads, heads, gate=torch.randn(4, 4)), "gate must be a DTensor, as q is"),
        "another mesh": (attend(heads, other, heads), "k must lie on q's mesh"),
        "tokens under whole offsets": (attend(tokens, tokens, tokens), f"offsets must be .* {at_rows}"),
        "heads under shared offsets": (attend(heads, heads, heads, shared_offsets), "q must be S.*0.* where rows are"),
        "plain positions of shared rows": (
            attend(tokens, tokens, tokens, shared_offsets, rope=testing.rotary_tables(4, 4), rope_positions=offsets),
            "rope_positions must be a DTensor with Shard.0., as the offsets",
        ),
        "channels of heads": (attend(*[made_on_line(Shard(2), 6, 2, 4)] * 3), "q must be Replicate.., or Shard of"),
        "partial sums": (attend(*[made_on_line(Partial(), 6, 2, 4)] * 3), "q must be Replicate.., or Shard of"),
        "whole queries": (
            attend(made_on_line(whole, 6, 4, 4), heads, heads),
            "q must be .* where heads are shared out",
        ),
        "partial keys": (attend(heads, made_on_line(Partial(), 6, 4, 4), heads), "k must be .* found P"),
        "uneven heads": (attend(uneven, uneven, uneven), "axis H of q must be a multiple of the 2 parts .* found 3"),
        "groups cut": (attend(ragged[0], ragged[1], ragged[1]), "6 query heads .* whole groups of 4, or lie in one"),
        "axes": (attend(made_on_line(Shard(1), 6, 4), heads, heads), r"q must be \[Tq, H, D\], found shape \[6, 8\]"),
        "activation of a part of a sum": (feed(activation="silu"), 'activation must be "identity" where channels'),
        "bias of a part of a sum": (feed(bias=made_on_line(whole, 2, 3)), "bias must be None where channels"),
    }


def refusals() -> dict[str, str]:
    """The message of each refused call."""
    said = {}
    for name, (run, _) in refused_calls().items():
        try:
            run()
        except (TypeError, ValueError) as error:
            said[name] = str(error)
    return said


def wanted_refusals() -> dict[str, str]:
    return {name: message for name, (_, message) in refused_calls().items()}


def shared_keys_by_rows() -> tuple[list[int], Tensor, Tensor]:
    """The output's global shape, this process' part of it, and what its own call gives; keys are its own, too."""
    mesh, rank = init_device_mesh("cpu", (WORLD,)), dist.get_rank()
    case = Case("gated_cross_attention", "", lengths=(3, 0, 4 + rank), kv_rows=(2, 0, 2, 1), gate="head", tail=0)
    own = testing.make_inputs(case, torch.float32, seed=rank)
    own = {name: own[name].detach() for name in ("q", "k", "v", "kv_offsets", "kv_rows", "gate")}

    def part(x: Tensor) -> DTensor:
        sizes = torch.tensor([len(x)])
        dist.all_reduce(sizes)
        shape = (int(sizes), *x.shape[1:])
        return DTensor.from_local(x, mesh, [Shard(0)], shape=shape, stride=torch.empty(shape, device="meta").stride())

    out = ik.gated_cross_attention(**{name: part(x) for name, x in own.items()})
    assert isinstance(out, DTensor)
    return list(out.shape), out.to_local(), ik.gated_cross_attention(**own)


WORKS = (on_a_line, layer_in_parallel, compiled_in_parallel, refusals, wanted_refusals, shared_keys_by_rows)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each of `WORKS` in each of the processes."""
    return run_together(WORKS, tmp_path_factory.mktemp("together"))


def test_parts_are_those_of_one_process(together: list[dict[str, Any]]) -> None:
    """One test of many cases: the processes are started once."""
    for rank, found in enumerate(together):
        assert len(found["on_a_line"]) == len(LINE)
        failures = {name: failure for name, failure in found["on_a_line"].items() if failure}
        assert not failures, f"process {rank}: {failures}"


def test_a_mesh_of_two_dimensions(tmp_path: Path) -> None:
    """Four processes share out rows and heads, or heads twice."""
    for rank, found in enumerate(run_together((on_a_square,), tmp_path, world=4)):
        failures = {name: failure for name, failure in found["on_a_square"].items() if failure}
        assert not failures, f"process {rank}: {failures}"


def test_each_process_has_candidates_and_keys_of_its_own(together: list[dict[str, Any]]) -> None:
    for shape, found, wanted in (found["shared_keys_by_rows"] for found in together):
        assert shape == [8, 3, 4, 16]
        assert torch.equal(found, wanted)


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


def test_what_would_need_sending_is_refused(together: list[dict[str, Any]]) -> None:
    for found in together:
        wanted = found["wanted_refusals"]
        assert found["refusals"].keys() == wanted.keys()
        for name, said in found["refusals"].items():
            assert re.search(wanted[name], said), f"{name}: {said}"


def test_the_package_does_not_import_dtensor() -> None:
    """It takes longer than all of ours; who has a DTensor has imported it."""
    code = "import sys, interformer_kernels; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
