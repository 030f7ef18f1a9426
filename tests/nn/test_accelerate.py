"""`accelerate` on PyTorch's own modules: equal outputs and gradients, the same parameters, and its warnings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import module_budget as budget
import pytest
import torch
from module_budget import perturbed, swapped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from interformer_kernels import accelerate

E, H = 16, 4


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0.0, **{"batch_first": True, **options})


def encoder(norm: bool = True, **options: Any) -> nn.TransformerEncoder:
    nested = not options  # PyTorch warns if it is not available.
    return nn.TransformerEncoder(encoder_layer(**options), 2, nn.LayerNorm(E) if norm else None, nested)


# ---------------------------------------------------------------- attention


def inputs_of(attention: nn.MultiheadAttention, shared: bool) -> Callable[[int], budget.Inputs]:
    """Draw one input for self attention, or three."""
    lead = (budget.ROWS, budget.WIDTH) if attention.batch_first else (budget.WIDTH, budget.ROWS)
    if shared:
        return lambda seed: budget.draw(seed, x=(*lead, E))
    sides = {"query": (*lead, E), "key": (*lead, attention.kdim), "value": (*lead, attention.vdim)}
    return lambda seed: budget.draw(seed, **sides)


def attend(module: Any, inputs: Mapping[str, Any], **masks: Any) -> Tensor:
    sides = (inputs["x"],) * 3 if "x" in inputs else (inputs["query"], inputs["key"], inputs["value"])
    return module(*sides, need_weights=False, **masks)[0]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False, "batch_first": True}, {"kdim": 12, "vdim": 20}], ids=str)
@pytest.mark.parametrize("kind", budget.PADDINGS)
def test_attention_with_padding(
    kind: str, options: dict[str, Any], additive: bool, notices: Callable[[], list[str]]
) -> None:
    """Outputs agree at padding too; a row of padding only gets zeros from its attention, and so the output's bias."""
    before = perturbed(nn.MultiheadAttention(E, H, **options))
    after = swapped(before)
    padding = budget.padding(kind)

    def run(module: Any, inputs: Mapping[str, Any]) -> Tensor:
        dtype = inputs[next(iter(inputs))].dtype
        mask = torch.zeros(padding.shape, dtype=dtype).masked_fill(padding, -torch.inf) if additive else padding
        out = attend(module, inputs, key_padding_mask=mask)
        if kind == "a row of padding" and module is after:
            row = out[0] if module.batch_first else out[:, 0]
            assert torch.equal(row, (row if module.out_proj.bias is None else module.out_proj.bias).expand_as(row))
            assert module.out_proj.bias is not None or not row.any()
        return out

    budget.assert_within_budget(before, after, inputs_of(before, shared="kdim" not in options), run)
    assert not notices()


@pytest.mark.parametrize("kind", [None, "right", "left", "both sides", "a row of padding"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("hint", [True, False])
def test_causal_attention(kind: str | None, shared: bool, hint: bool, notices: Callable[[], list[str]]) -> None:
    before = perturbed(nn.MultiheadAttention(E, H, batch_first=True))
    causal = torch.ones(budget.WIDTH, budget.WIDTH, dtype=torch.bool).triu(1)
    masks = {"attn_mask": causal, "key_padding_mask": None if kind is None else budget.padding(kind)}

    def run(module: Any, inputs: Mapping[str, Any]) -> Tensor:
        return attend(module, inputs, is_causal=hint, **masks)

    budget.assert_within_budget(before, swapped(before), inputs_of(before, shared), run)
    assert not notices()


def test_attention_without_masks() -> None:
    before = perturbed(nn.MultiheadAttention(E, H))
    for shared in (True, False):
        budget.assert_within_budget(before, swapped(before), inputs_of(before, shared), attend)
    after, query, key = swapped(before), torch.randn(2, 3, E), torch.randn(5, 3, E)
    torch.testing.assert_close(
        after(query, key, key, need_weights=False)[0], before(query, key, key, need_weights=False)[0]
    )


def test_inference_of_a_padded_row_is_finite() -> None:
    """PyTorch's fused path returns NaN for a row of padding only."""
    before = perturbed(nn.MultiheadAttention(E, H, batch_first=True)).eval()
    x, padding = torch.randn(3, 6, E), budget.padding("a row of padding")
    with torch.no_grad():
        expected, actual = (attend(m, {"x": x}, key_padding_mask=padding) for m in (before, swapped(before)))
    torch.testing.assert_close(actual[1:], expected[1:])
    assert expected[0].isnan().all()
    assert torch.equal(actual[0], before.out_proj.bias.expand(6, E))


X, EYE_HIDDEN = torch.randn(3, 6, E), torch.eye(6, dtype=torch.bool)
CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)
FLOATING = torch.zeros(3, 6).masked_fill(budget.padding("right"), -2.0)
UNSERVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "need_weights=True (the default)": ({}, {"need_weights": True}),
    "a causal mask or a window together with padding that has holes": (
        {},
        {"attn_mask": CAUSAL, "key_padding_mask": budget.padding("holes")},
    ),
    "an additive key_padding_mask with numbers other than 0 and -inf": ({}, {"key_padding_mask": FLOATING}),
    "an attn_mask that is neither causal nor a window nor padding": ({}, {"attn_mask": EYE_HIDDEN}),
}


@pytest.mark.parametrize("reason", UNSERVED)
def test_calls_that_take_pytorchs_path_say_so_once(reason: str, notices: Callable[[], list[str]]) -> None:
    """Such calls give PyTorch's bits, too."""
    options, arguments = UNSERVED[reason]
    before = perturbed(nn.MultiheadAttention(E, H, batch_first=True, **options))
    after = swapped(before)
    result = []
    for module in (before, after, after):
        torch.manual_seed(5)
        result.append(module(X, X, X, **{"need_weights": False, **arguments}))
    assert torch.equal(result[0][0], result[1][0])
    assert (result[1][1] is None) == (not arguments.get("need_weights"))
    (notice,) = notices()
    assert notice.startswith(f"MultiheadAttention takes PyTorch's own path for {reason}")


def test_pytorch_refuses_what_it_refused() -> None:
    """Invalid calls raise PyTorch's own errors."""
    after = swapped(nn.MultiheadAttention(E, H, batch_first=True))
    for arguments in ({"key_padding_mask": budget.padding("right")[:2]}, {"is_causal": True}):
        with pytest.raises((AssertionError, RuntimeError)):
            after(X, X, X, need_weights=False, **arguments)


# ---------------------------------------------------------------- encoders


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", budget.PADDINGS)
def test_encoder_layer(kind: str, norm_first: bool) -> None:
    before = perturbed(encoder_layer(norm_first=norm_first))

    def run(module: Any, inputs: Mapping[str, Any]) -> Tensor:
        return module(inputs["x"], src_key_padding_mask=budget.padding(kind))

    budget.assert_within_budget(before, swapped(before), lambda seed: budget.draw(seed, x=(3, 6, E)), run)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", budget.PADDINGS)
def test_encoder_is_packed(kind: str, norm: bool, notices: Callable[[], list[str]]) -> None:
    """Outputs agree at tokens; the layers skip padding, where the output is that of zero inputs."""
    before, padding = perturbed(encoder(norm)), budget.padding(kind)
    after = swapped(before)

    def run(module: Any, inputs: Mapping[str, Any]) -> Tensor:
        out = module(inputs["x"], src_key_padding_mask=padding)
        if module is after:
            hidden = torch.zeros(E) if module.norm is None else module.norm.bias
            assert torch.equal(out[padding], hidden.expand(int(padding.sum()), E))
            nothing = inputs["x"].masked_fill(padding[..., None], torch.nan)
            assert torch.equal(out, module(nothing, src_key_padding_mask=padding))
        return out[~padding]

    budget.assert_within_budget(before, after, lambda seed: budget.draw(seed, x=(3, 6, E)), run)
    assert not notices()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["right", "a row of padding"])
def test_encoder_at_inference(kind: str) -> None:
    """If PyTorch's own encoder uses nested tensors, the outputs agree at padding too."""
    before, x = perturbed(encoder()).eval(), torch.randn(3, 6, E)
    padding = budget.padding(kind)
    with torch.no_grad():
        expected, actual = (module(x, src_key_padding_mask=padding) for module in (before, swapped(before)))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("case", ["causal", "hooks", "batch second", "norm first", "no padding"])
def test_encoders_that_are_not_packed(case: str) -> None:
    """Their layers are served instead; the output equals PyTorch's everywhere, also at padding."""
    options = {"batch second": {"batch_first": False}, "norm first": {"norm_first": True}}.get(case, {})
    before = perturbed(encoder(**options))
    after, calls = swapped(before), []
    masks: dict[str, Any] = {"src_key_padding_mask": None if case == "no padding" else budget.padding("right")}
    if case == "causal":
        masks["mask"] = CAUSAL
    if case == "hooks":
        after.layers[0].linear1.register_forward_hook(lambda *call: calls.append(call))
    shape = (6, 3, E) if case == "batch second" else (3, 6, E)

    def run(module: Any, inputs: Mapping[str, Any]) -> Tensor:
        return module(inputs["x"], **masks)

    budget.assert_within_budget(before, after, lambda seed: budget.draw(seed, x=shape), run)
    assert bool(calls) == (case == "hooks")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_take_pytorchs_path(notices: Callable[[], list[str]]) -> None:
    before = perturbed(encoder_layer()).eval()
    nested = torch.nested.nested_tensor([X[0, :3], X[1]])
    with torch.no_grad():
        expected, actual = (module(nested).to_padded_tensor(0.0) for module in (before, swapped(before)))
    assert torch.equal(actual, expected)
    assert notices() == ["TransformerEncoderLayer takes PyTorch's own path for nested tensors"]


def test_dropout_in_training() -> None:
    """The packed encoder and single attention drop weights: reproduced by the seed, and on average PyTorch's output."""
    before = perturbed(encoder())
    after = swapped(before).train()
    for layer in after.layers:
        layer.self_attn.dropout = 0.3
    padding = budget.padding("right")

    def run(module: Any, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(X, src_key_padding_mask=padding)[~padding]

    assert torch.equal(run(after, 1), run(after, 1))
    assert not torch.equal(run(after, 1), run(after, 2))
    attention = after.layers[0].self_attn
    plain = attend(attention.eval(), {"x": X}, key_padding_mask=padding)
    runs = torch.stack([attend(attention.train(), {"x": X}, key_padding_mask=padding) for _ in range(600)])
    error = (runs.mean(0) - plain) / (runs.std(0) / len(runs) ** 0.5)
    assert error.abs().max() < 6


# ---------------------------------------------------------------- under the compiler


def test_compiled(notices: Callable[[], list[str]]) -> None:
    """Without padding the ops serve in one graph; with padding PyTorch's own path does, with a warning."""
    before = perturbed(nn.MultiheadAttention(E, H, batch_first=True))
    after = swapped(before)
    compiled = torch.compile(after, fullgraph=True, backend="eager")
    for masks in ({}, {"attn_mask": CAUSAL, "is_causal": True}):
        assert torch.equal(attend(compiled, {"x": X}, **masks), attend(after, {"x": X}, **masks))
    assert not notices()
    padding = budget.padding("holes")
    result = attend(compiled, {"x": X}, key_padding_mask=padding)
    assert torch.equal(result, attend(before, {"x": X}, key_padding_mask=padding))
    (notice,) = notices()
    assert "padding masks under torch.compile" in notice


# ---------------------------------------------------------------- under torch.func


PER_CALL = (torch.arange(6) >= torch.tensor([1, 4, 6, 2, 3]).view(5, 1, 1)).expand(5, 2, 6)
JVP = "forward-mode derivatives (jvp), which the ops do not have"
VMAP = "masks that differ under vmap, where their contents cannot be read"


def transforms() -> dict[str, tuple[str, Callable[[Any], Tensor]]]:
    """Calls under a transform that PyTorch's module serves, and the swapped one's reason to leave them to it."""
    x = torch.randn(5, 2, 6, E, generator=torch.Generator().manual_seed(1))

    def out(module: Any, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return module(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    def total(module: Any) -> Callable[..., Tensor]:
        return lambda *inputs: out(module, *inputs).square().sum()

    def parameters(module: Any) -> Tensor:
        held = {name: p.detach() for name, p in module.named_parameters()}
        run = lambda held: torch.func.functional_call(module, held, (x[0],) * 3, {"need_weights": False})[0]  # noqa: E731
        return torch.func.jvp(run, (held,), (held,))[1]

    return {
        "masks": (VMAP, lambda m: torch.vmap(lambda *inputs: out(m, *inputs))(x, PER_CALL)),
        "masks alone": (VMAP, lambda m: torch.vmap(lambda padding: out(m, x[0], padding))(PER_CALL)),
        "gradients": (VMAP, lambda m: torch.vmap(torch.func.grad(total(m)))(x, PER_CALL)),
        "jvp": (JVP, lambda m: torch.func.jvp(lambda x: out(m, x, PER_CALL[3]), (x[0],), (x[1],))[1]),
        "jvp of parameters": (JVP, parameters),
        "jvp of vmap": (JVP, lambda m: torch.func.jvp(torch.vmap(lambda x: out(m, x)), (x,), (x,))[1]),
        "vmap of jvp": (JVP, lambda m: torch.vmap(lambda x: torch.func.jvp(lambda y: out(m, y), (x,), (x,))[1])(x)),
        "hessian": (JVP, lambda m: torch.func.hessian(total(m))(x[0, :1, :2])),
    }


@pytest.mark.parametrize("case", transforms())
def test_transforms_that_the_ops_have_not_take_pytorchs_path(case: str, notices: Callable[[], list[str]]) -> None:
    """The bits are PyTorch's, and the calls are counted and logged."""
    reason, run = transforms()[case]
    before = perturbed(nn.MultiheadAttention(E, H, batch_first=True))
    after = copy.deepcopy(before)
    calls = accelerate(after).calls()[""]
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other kernels have no forward-mode derivative.
        assert torch.equal(run(after), run(before))
    assert calls.served == 0
    assert set(calls.unserved) == {reason}
    assert notices() == [f"MultiheadAttention takes PyTorch's own path for {reason}"]


def test_one_mask_for_all_of_vmap_is_served() -> None:
    before = perturbed(nn.MultiheadAttention(E, H, batch_first=True))
    after = copy.deepcopy(before)
    calls = accelerate(after).calls()[""]
    x = torch.randn(5, 2, 6, E)
    result = [torch.vmap(lambda x, m=m: attend(m, {"x": x}, key_padding_mask=PER_CALL[3]))(x) for m in (after, before)]
    torch.testing.assert_close(*result)
    assert (calls.served, calls.unserved) == (1, {})


@pytest.mark.parametrize("make", [encoder_layer, encoder])
def test_encoders_under_transforms(make: Callable[[], nn.Module]) -> None:
    before = perturbed(make())
    after = copy.deepcopy(before)
    report = accelerate(after)
    x = torch.randn(5, 2, 6, E)
    with sdpa_kernel(SDPBackend.MATH):
        for run in (
            lambda m: torch.vmap(lambda x, padding: m(x, src_key_padding_mask=padding))(x, PER_CALL),
            lambda m: torch.func.jvp(lambda x: m(x, src_key_padding_mask=PER_CALL[3]), (x[0],), (x[1],))[1],
        ):
            assert torch.equal(run(after), run(before))
    for calls in report.calls().values():
        assert (calls.served, calls.unserved) == (0, {VMAP: 1, JVP: 1})


# ---------------------------------------------------------------- calls in the report


def test_the_report_counts_calls() -> None:
    """A module whose callers never pass need_weights=False is swapped but serves no call; the report shows it."""
    model = nn.ModuleDict({"used": nn.MultiheadAttention(E, H), "careless": nn.MultiheadAttention(E, H)})
    dry = accelerate(model, dry_run=True)
    report = accelerate(model)
    assert "    serves calls with need_weights=False" in str(dry)
    assert not any("calls served" in line for line in str(report).splitlines())
    for _ in range(3):
        model["used"](X, X, X, need_weights=False)
        model["careless"](X, X, X)
    calls = report.calls()
    weights = "need_weights=True (the default), because the ops do not return attention weights"
    assert list(calls) == ["used", "careless"]
    assert (calls["used"].served, calls["used"].unserved) == (3, {})
    assert (calls["careless"].served, calls["careless"].unserved) == (0, {weights: 3})
    lines = str(report).splitlines()
    assert "    3 calls served" in lines
    assert f"    0 calls served; 3 not served: {weights}" in lines
    copied = copy.deepcopy(model)  # The copy counts its own calls.
    copied["used"](X, X, X, need_weights=False)
    assert calls["used"].served == 3


def test_the_report_counts_calls_of_encoders() -> None:
    """A packed encoder serves all its modules; an unpacked one is served if its layers are."""
    model = encoder()
    calls = accelerate(model).calls()
    model(X, src_key_padding_mask=budget.padding("right"))
    assert {name: (c.served, c.unserved) for name, c in calls.items()} == dict.fromkeys(calls, (1, {}))
    model(X)
    assert {name: (c.served, c.unserved) for name, c in calls.items()} == dict.fromkeys(calls, (2, {}))
    model(X, mask=EYE_HIDDEN)
    reason = "an attn_mask that is neither causal nor a window nor padding"
    assert {name: (c.served, c.unserved) for name, c in calls.items()} == dict.fromkeys(calls, (2, {reason: 1}))
