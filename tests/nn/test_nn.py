"""The modules: compared with PyTorch's and with their ops, packed and padded, folded and not; copying and saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import module_budget as budget
import pytest
import torch
from module_budget import perturbed
from torch import Tensor, nn

from interformer_kernels.nn import GatedCrossAttention, JaggedSelfAttention, PersonalizedFFN, PMAPooling
from interformer_kernels.testing import offsets_of, rotary_tables

E, H, M = 16, 4, 2
LENGTHS = (5, 0, 3)


# ---------------------------------------------------------------- against PyTorch's modules


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", budget.PADDINGS)
def test_self_attention_is_pytorchs(kind: str, batch_first: bool) -> None:
    """Outputs agree at tokens and are zero at padding."""
    original = perturbed(nn.MultiheadAttention(E, H, batch_first=batch_first))
    ported = JaggedSelfAttention.from_torch(original)
    padding = budget.padding(kind)

    def run(module: Any, inputs: Any) -> Tensor:
        x = inputs["x"] if batch_first else inputs["x"].transpose(0, 1)
        if module is ported:
            out = module(x, key_padding_mask=padding)
        else:
            out = module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        out = out if batch_first else out.transpose(0, 1)
        if module is ported:
            assert not out[padding].any()
        return out[~padding]

    budget.assert_within_budget(original, ported, lambda seed: budget.draw(seed, x=(3, 6, E)), run)


@pytest.mark.parametrize("widths", [{}, {"kdim": 12, "vdim": 20}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", budget.PADDINGS)
def test_cross_attention_is_pytorchs(kind: str, widths: dict[str, Any]) -> None:
    original = perturbed(nn.MultiheadAttention(E, H, batch_first=True, **widths))
    ported = GatedCrossAttention.from_torch(original)
    padding = budget.padding(kind)

    def run(module: Any, inputs: Any) -> Tensor:
        sides = inputs["query"], inputs["key"], inputs["value"]
        if module is ported:
            return module(*sides, key_mask=~padding)
        return module(*sides, key_padding_mask=padding, need_weights=False)[0]

    shapes = {"query": (3, M, E), "key": (3, 6, original.kdim), "value": (3, 6, original.vdim)}
    budget.assert_within_budget(original, ported, lambda seed: budget.draw(seed, **shapes), run)


@pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 20}, {"bias": False}], ids=str)
def test_modules_start_as_pytorchs(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    original = nn.MultiheadAttention(E, H, **options).state_dict()
    torch.manual_seed(3)
    ported = GatedCrossAttention(E, H, **options, gate_activation=None).state_dict()
    assert list(ported) == list(original)
    assert all(torch.equal(ported[name], original[name]) for name in ported)


ROUND_TRIPS: dict[str, Callable[[nn.MultiheadAttention], Any]] = {
    "JaggedSelfAttention": JaggedSelfAttention.from_torch,
    "GatedCrossAttention": GatedCrossAttention.from_torch,
    "PMAPooling": lambda module: PMAPooling.from_torch(module, torch.randn(M, E)),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
@pytest.mark.parametrize("bias", [True, False])
def test_to_and_from_torch_share_parameters(name: str, bias: bool) -> None:
    original = nn.MultiheadAttention(E, H, dropout=0.25, bias=bias, batch_first=True).eval()
    back = ROUND_TRIPS[name](original).to_torch()
    back = back[0] if isinstance(back, tuple) else back
    assert dict(back.named_parameters()).keys() == dict(original.named_parameters()).keys()
    assert all(x is y for x, y in zip(back.parameters(), original.parameters(), strict=True))
    assert (back.dropout, back.batch_first, back.training) == (0.25, True, False)
    x = torch.randn(3, 6, E)
    assert torch.equal(back(x, x, x)[0], original(x, x, x)[0])


def test_a_gate_is_added_to_pytorchs_module() -> None:
    original = nn.MultiheadAttention(E, H, batch_first=True).double()
    ported = GatedCrossAttention.from_torch(original, gate_activation="sigmoid")
    nn.init.zeros_(ported.gate_proj.weight)
    nn.init.constant_(ported.gate_proj.bias, 100.0)  # An open gate.
    query, key = torch.randn(3, M, E).double(), torch.randn(3, 6, E).double()
    torch.testing.assert_close(ported(query, key), original(query, key, key, need_weights=False)[0])


def test_a_parameter_of_seeds_is_shared() -> None:
    seeds = nn.Parameter(torch.randn(M, E))
    assert PMAPooling.from_torch(nn.MultiheadAttention(E, H), seeds).to_torch()[1] is seeds


# ---------------------------------------------------------------- packed and padded


def packed_and_padded() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed tokens with a NaN tail, their offsets, the same tokens padded on the right, and the padding mask."""
    offsets, x = offsets_of(LENGTHS), torch.randn(sum(LENGTHS) + 2, E)
    x[sum(LENGTHS) :] = torch.nan
    padding = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]
    padded = torch.full((len(LENGTHS), max(LENGTHS), E), torch.nan)
    padded[~padding] = x[: sum(LENGTHS)]
    return x.requires_grad_(), offsets, padded, padding


MODULES: dict[str, tuple[Callable[[], Any], Callable[..., Tensor]]] = {
    "JaggedSelfAttention": (
        lambda: JaggedSelfAttention(E, H, batch_first=True, causal=True),
        lambda module, x, **rows: module(x, **rows),
    ),
    "PMAPooling": (lambda: PMAPooling(E, H, M, batch_first=True), lambda module, x, **rows: module(x, **rows)),
    "PMAPooling, Set Transformer": (
        lambda: PMAPooling(E, H, M, batch_first=True, set_transformer=True),
        lambda module, x, **rows: module(x, **rows),
    ),
    "GatedCrossAttention": (
        lambda: GatedCrossAttention(E, H, batch_first=True),
        lambda module, x, offsets=None, **rows: module(CONTEXT[:, None], x, kv_offsets=offsets, **rows),
    ),
    "PersonalizedFFN": (
        lambda: PersonalizedFFN(E, E, batch_first=True, activation="silu", residual=True),
        lambda module, x, **rows: module(x, CONTEXT, **rows),
    ),
}
CONTEXT = torch.randn(len(LENGTHS), E, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODULES)
def test_padded_is_packed(name: str) -> None:
    """Both polarities of the mask, packed rows with a NaN tail, and NaN padding give the same bits."""
    make, call = MODULES[name]
    module = perturbed(make())
    x, offsets, padded, padding = packed_and_padded()
    out = call(module, x, offsets=offsets)
    first = call(module, padded, key_padding_mask=padding)
    assert torch.equal(first, call(module, padded, key_mask=~padding))
    assert torch.equal(first, call(module, padded, key_mask=(~padding).long()))
    if first.shape[:2] == padding.shape:
        assert torch.equal(out[: sum(LENGTHS)], first[~padding])
        assert not out[sum(LENGTHS) :].any()
        assert not first[padding].any()
    else:
        assert torch.equal(out, first)
    out.sum().backward()
    assert not x.grad[sum(LENGTHS) :].any()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_without_a_mask_all_are_tokens(name: str) -> None:
    make, call = MODULES[name]
    module = perturbed(make())
    x = torch.randn(len(LENGTHS), 4, E)
    assert torch.equal(call(module, x), call(module, x, key_mask=torch.ones(len(LENGTHS), 4, dtype=torch.bool)))


def test_the_batch_may_be_second() -> None:
    x, query = torch.randn(3, 6, E), torch.randn(3, M, E)
    for make, call in (
        (lambda first: PMAPooling(E, H, M, batch_first=first), lambda module, x, _: module(x)),
        (lambda first: GatedCrossAttention(E, H, batch_first=first), lambda module, x, query: module(query, x)),
    ):
        first, second = make(True), make(False)
        second.load_state_dict(first.state_dict())
        transposed = call(second, x.transpose(0, 1), query.transpose(0, 1))
        assert torch.equal(call(first, x, query), transposed.transpose(0, 1))


def test_jagged_queries() -> None:
    module = perturbed(GatedCrossAttention(E, H, batch_first=True))
    query, key, kv_offsets = torch.randn(3, M, E), torch.randn(8, E), offsets_of(LENGTHS)
    packed = module(query.flatten(0, 1), key, q_offsets=offsets_of((M,) * 3), kv_offsets=kv_offsets)
    assert torch.equal(packed.unflatten(0, (3, M)), module(query, key, kv_offsets=kv_offsets))


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({"causal": True}, lambda i, j: j > i),
        ({"window": (2, 1)}, lambda i, j: (j < i - 2) | (j > i + 1)),
        ({"window": (1, 0), "num_prefix": 2}, lambda i, j: ((j < i - 1) | (j > i)) & (i >= 2) & (j >= 2)),
    ],
    ids=["causal", "window", "prefix"],
)
def test_masks_of_self_attention(options: dict[str, Any], hidden: Callable[[Tensor, Tensor], Tensor]) -> None:
    original = perturbed(nn.MultiheadAttention(E, H, batch_first=True))
    ported = JaggedSelfAttention.from_torch(original, **options)
    mask = hidden(torch.arange(6)[:, None], torch.arange(6))

    def run(module: Any, inputs: Any) -> Tensor:
        x = inputs["x"]
        return module(x) if module is ported else module(x, x, x, attn_mask=mask, need_weights=False)[0]

    budget.assert_within_budget(original, ported, lambda seed: budget.draw(seed, x=(3, 6, E)), run)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_self_attention_sees_distances(interleaved: bool) -> None:
    """Rotation depends on the index in the row: pairs of tokens at equal distance have equal scores."""
    module = perturbed(JaggedSelfAttention(E, 1, rope_interleaved=interleaved, batch_first=True))
    rope = rotary_tables(6, E)
    x = torch.randn(1, 1, E).expand(1, 6, E) + torch.zeros(1, 6, E)
    padded = torch.cat((torch.full((1, 2, E), torch.nan), x), 1)
    left_padding = torch.tensor([[True] * 2 + [False] * 6])
    with_rope = module(x, rope=rope)
    assert torch.equal(module(padded, key_padding_mask=left_padding, rope=rope)[~left_padding], with_rope[0])
    moved = perturbed(torch.nn.Identity())(torch.randn(1, 6, E))
    assert not torch.allclose(module(moved, rope=rope), module(moved))


@pytest.mark.parametrize("form", ["multiply", "self"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_gate(form: str, activation: str) -> None:
    """`W_O G(A, W_G x)`, computed by an ungated module with the identity as output projection."""
    module = perturbed(GatedCrossAttention(E, H, gate_form=form, gate_activation=activation, batch_first=True)).double()
    query, key = torch.randn(3, M, E).double(), torch.randn(3, 6, E).double()
    plain = nn.MultiheadAttention(E, H, batch_first=True).double()
    plain.load_state_dict({k: x for k, x in module.state_dict().items() if not k.startswith("gate")})
    nn.init.eye_(plain.out_proj.weight)
    nn.init.zeros_(plain.out_proj.bias)
    attn_out, gate = plain(query, key, key, need_weights=False)[0], module.gate_proj(query)
    act = getattr(torch, activation)
    gated = attn_out * act(gate) if form == "multiply" else act(attn_out * gate)
    torch.testing.assert_close(module(query, key), module.out_proj(gated))


# ---------------------------------------------------------------- personalised feed-forward


def test_each_row_has_its_own_layer() -> None:
    module = perturbed(PersonalizedFFN(E, 6, 5))
    x, context, offsets = torch.randn(8, E), torch.randn(3, 6), offsets_of(LENGTHS)
    out = module(x, context, offsets=offsets)
    for row in range(3):
        tokens = slice(int(offsets[row]), int(offsets[row + 1]))
        torch.testing.assert_close(out[tokens], module.to_torch(context[row])(x[tokens]))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_where_it_starts(bias: bool) -> None:
    linear = nn.Linear(E, 5, bias=bias)
    module = PersonalizedFFN.from_torch(linear, 6)
    x, context = torch.randn(8, E), torch.randn(3, 6)
    torch.testing.assert_close(module(x, context, offsets=offsets_of((5, 0, 3))), linear(x))
    assert torch.equal(module.to_torch(context[0]).weight, linear.weight)
    module(x, context, offsets=offsets_of((5, 0, 3))).square().sum().backward()
    assert module.weight_proj.weight.grad.any()


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("name", ["JaggedSelfAttention", "GatedCrossAttention", "PMAPooling"])
def test_dropout(name: str) -> None:
    """One key has weight 1: dropout of 1/2 doubles it, or drops it, and the output is the bias alone."""
    make: dict[str, Callable[[], Any]] = {
        "JaggedSelfAttention": lambda: JaggedSelfAttention(E, 1, dropout=0.5),
        "GatedCrossAttention": lambda: GatedCrossAttention(E, 1, dropout=0.5, gate_activation=None),
        "PMAPooling": lambda: PMAPooling(E, 1, dropout=0.5),
    }
    module = perturbed(make[name]())
    rows = 64
    x, offsets = torch.randn(1, E).expand(rows, E), torch.arange(rows + 1)

    def call() -> Tensor:
        if name == "GatedCrossAttention":
            return module(x, x, q_offsets=offsets, kv_offsets=offsets)
        return module(x, offsets=offsets).view(rows, E)

    torch.manual_seed(3)
    dropped = call()
    torch.manual_seed(3)
    assert torch.equal(dropped, call())
    module.eval()
    whole = call()[0]
    bias = module.out_proj.bias
    not_dropped = (dropped - bias).abs().amax(-1) > 1e-6
    assert 10 < not_dropped.sum() < rows - 10
    torch.testing.assert_close(dropped[not_dropped], (bias + 2 * (whole - bias)).expand(int(not_dropped.sum()), E))
    dropped.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


DROPPING: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "self attention with rotary embedding and masks": (
        lambda: JaggedSelfAttention(E, H, 1e-9, window=(2, 1), num_prefix=1, rope_interleaved=True),
        lambda module, x: module(x, offsets=offsets_of(LENGTHS), rope=rotary_tables(5, 4)),
    ),
    "gated cross attention": (
        lambda: GatedCrossAttention(E, H, 1e-9, gate_form="self", gate_activation="tanh"),
        lambda module, x: module(CONTEXT[None], x, kv_offsets=offsets_of(LENGTHS)),
    ),
    "Set Transformer's pooling": (
        lambda: PMAPooling(E, H, M, 1e-9, set_transformer=True),
        lambda module, x: module(x, offsets=offsets_of(LENGTHS)),
    ),
}


@pytest.mark.parametrize("name", DROPPING)
def test_the_reference_computes_what_the_ops_do(name: str) -> None:
    """The dropout is so small that nothing is dropped; every option of the module is used."""
    make, call = DROPPING[name]
    module, x = perturbed(make()), torch.randn(sum(LENGTHS), E)
    torch.testing.assert_close(call(module, x), call(module.eval(), x))


# ---------------------------------------------------------------- copying, saving, compiling


@pytest.mark.parametrize("name", MODULES)
def test_copies_compute_the_same(name: str) -> None:
    make, call = MODULES[name]
    module = perturbed(make())
    x = torch.randn(len(LENGTHS), 4, E)
    fresh = make()
    fresh.load_state_dict(module.state_dict())
    for way, copied in {**budget.copies(module), "state_dict": fresh}.items():
        assert torch.equal(call(copied, x), call(module, x)), way


@pytest.mark.parametrize("name", MODULES)
def test_safetensors(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="safetensors (the extra `ecosystem`) is not installed"
    )
    make, call = MODULES[name]
    module, fresh = perturbed(make()), make()
    safetensors.save_model(module, tmp_path / "module.safetensors")
    safetensors.load_model(fresh, tmp_path / "module.safetensors")
    x = torch.randn(len(LENGTHS), 4, E)
    assert torch.equal(call(fresh, x), call(module, x))


@pytest.mark.parametrize("name", MODULES)
def test_packed_input_compiles_to_one_graph(name: str) -> None:
    make, call = MODULES[name]
    module = perturbed(make())
    x, offsets = torch.randn(sum(LENGTHS), E), offsets_of(LENGTHS)
    compiled = torch.compile(lambda x, offsets: call(module, x, offsets=offsets), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, offsets), call(module, x, offsets=offsets))


@pytest.mark.parametrize("name", MODULES)
def test_autocast(name: str) -> None:
    make, call = MODULES[name]
    module = perturbed(make())
    x, offsets = torch.randn(sum(LENGTHS), E), offsets_of(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(module, x, offsets=offsets)
    plain = call(module, x, offsets=offsets)
    assert (out - plain).abs().max() < 0.1 * plain.abs().max()
    out.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
