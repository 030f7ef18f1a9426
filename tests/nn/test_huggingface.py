"""`attn_implementation="interformer"` in real models of transformers: logits and gradients compared with their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import module_budget as budget
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers (the extra `ecosystem`) is not installed")
from interformer_kernels.nn import huggingface  # noqa: E402

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES.update(num_attention_heads=4, max_position_embeddings=32)
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        add_pooling_layer=False,
    ),
    "bart": lambda: transformers.BartModel(
        transformers.BartConfig(
            vocab_size=32,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            dropout=0.0,
        )
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=3)),
}


def ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(seed))


IDS = ids(0, 3, 6)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    huggingface.register()
    huggingface.register()


def pair(name: str) -> tuple[Any, Any]:
    """The model with transformers' own sdpa attention, and a copy with ours; weights large enough to matter."""
    before = MODELS[name]()
    with torch.no_grad():
        for parameter in before.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    before.set_attn_implementation("sdpa")
    after = copy.deepcopy(before)
    after.set_attn_implementation("interformer")
    return before, after


def outputs_of(model: Any, **inputs: Any) -> Tensor:
    out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def compare(before: nn.Module, after: nn.Module, run: budget.Run, shape: tuple[int, ...] = (3, 6)) -> None:
    """Compare over several draws of the ids."""
    budget.assert_within_budget(before, after, lambda seed: {"ids": ids(seed, *shape)}, run)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("kind", budget.PADDINGS)
def test_padded(name: str, kind: str, notices: Callable[[], list[str]]) -> None:
    """Outputs agree at tokens; a row of padding only gives finite outputs and gradients."""
    before, after = pair(name)
    padding = budget.padding(kind)

    def run(model: Any, inputs: Mapping[str, Any]) -> Tensor:
        out = outputs_of(model, input_ids=inputs["ids"], attention_mask=(~padding).long())
        assert model is not after or out.isfinite().all()
        return out[~padding]

    compare(before, after, run)
    assert not notices()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_without_padding(name: str, notices: Callable[[], list[str]]) -> None:
    before, after = pair(name)
    for mask in (None, torch.ones_like(IDS)):
        run = partial(
            lambda model, inputs, mask: outputs_of(model, input_ids=inputs["ids"], attention_mask=mask), mask=mask
        )
        compare(before, after, run)
    assert not notices()


@pytest.mark.parametrize("kind", ["left", "holes"])
def test_encoder_and_decoder(kind: str, notices: Callable[[], list[str]]) -> None:
    """Cross attention: the keys are padded, and the queries are another sequence, of equal or different length."""
    before, after = pair("bart")
    padding = budget.padding(kind)
    for decoded in (IDS, IDS[:, :4]):

        def run(model: Any, inputs: Mapping[str, Any], decoded: Tensor = decoded) -> Tensor:
            tokens = (~padding).long()
            return outputs_of(model, input_ids=inputs["ids"], attention_mask=tokens, decoder_input_ids=decoded)

        compare(before, after, run)
    assert not notices()


LENGTHS = (4, 1, 5)


@pytest.mark.parametrize("rows_by", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed(name: str, rows_by: str, notices: Callable[[], list[str]]) -> None:
    """Each packed row is computed as if it were alone, under a window, too."""
    before, after = pair(name)
    rows: dict[str, Any] = {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    if rows_by == "cu_seq_lens":
        offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        rows.update(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=5, max_length_k=5)

    def run(model: Any, inputs: Mapping[str, Any]) -> Tensor:
        if model is after:
            return outputs_of(model, input_ids=inputs["ids"], use_cache=False, **rows)
        return torch.cat([outputs_of(model, input_ids=row) for row in inputs["ids"].split(LENGTHS, 1)], 1)

    compare(before, after, run, (1, sum(LENGTHS)))
    assert not notices()


def test_generation_with_a_cache(notices: Callable[[], list[str]]) -> None:
    """Prefill, then single queries over the cache, of rows padded on the left."""
    before, after = pair("llama")
    arguments: dict[str, Any] = {"input_ids": IDS, "attention_mask": (~budget.padding("left")).long()}
    arguments.update(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    expected, actual = (model.eval().generate(**arguments) for model in (before, after))
    assert torch.equal(expected.sequences, actual.sequences)
    torch.testing.assert_close(actual.logits, expected.logits)
    assert not notices()


def test_some_queries_over_a_cache() -> None:
    """More than one query and fewer than keys: the last query is aligned with the last key."""
    before, after = pair("llama")
    result = []
    for model in (before.eval(), after.eval()):
        with torch.no_grad():
            cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
            result.append(model(input_ids=IDS[:, 3:], cache=cache).logits)
    torch.testing.assert_close(result[1], result[0])


@pytest.mark.parametrize("case", ["a window over holes", "a mask of pairs", "a static cache", "compiled with padding"])
def test_calls_that_take_sdpa_say_so_once(case: str, notices: Callable[[], list[str]]) -> None:
    before, after = pair("mistral" if case == "a window over holes" else "llama")
    padding = budget.padding("right")
    if case == "a window over holes":
        padding[:, 1] = True
    mask: Tensor = (~padding).long()
    if case == "a mask of pairs":
        mask = (torch.ones(6, 6).tril() * mask[:, None]).bool()[:, None]
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": mask}
    if case == "a static cache":
        arguments: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
        arguments["disable_compile"] = True
        expected, actual = (m.eval().generate(**inputs, **arguments) for m in (before, after))
        assert torch.equal(expected, actual)
    else:
        call = torch.compile(after, backend="eager") if case == "compiled with padding" else after
        inputs["use_cache"] = False
        before.set_attn_implementation("sdpa")
        held = ~padding
        torch.testing.assert_close(outputs_of(call, **inputs)[held], outputs_of(before, **inputs)[held])
    notice = [line for line in notices() if "transformers' sdpa serves" in line]
    words = {
        "a window over holes": "a window over padding",
        "a static cache": "static cache",
        "a mask of pairs": "masks [B, 1, Lq, Lk]",
    }
    assert len([line for line in notice if words.get(case, "torch.compile") in line]) == 1


def test_compiled_without_padding() -> None:
    _, after = pair("llama")
    compiled = torch.compile(after, backend="eager")
    torch.testing.assert_close(
        outputs_of(compiled, input_ids=IDS, use_cache=False), outputs_of(after, input_ids=IDS, use_cache=False)
    )


def test_dropout() -> None:
    """With one key per query its weight is 1: some heads of some tokens are dropped, the others doubled."""
    out = huggingface.attention(nn.Identity(), *torch.ones(3, 5, 4, 1, 8).unbind(0), None, dropout=0.5, is_causal=True)[
        0
    ]
    assert set(out.flatten().tolist()) == {0.0, 2.0}
    mask = torch.ones(5, 1, 1, 1, dtype=torch.bool)
    out = huggingface.attention(nn.Identity(), *torch.ones(3, 5, 4, 1, 8).unbind(0), mask, dropout=0.5)[0]
    assert set(out.flatten().tolist()) <= {0.0, 2.0}
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        q = torch.randn(5, 4, 6, 8)
        runs.append(huggingface.attention(nn.Identity(), q, q, q, None, dropout=0.5, is_causal=True)[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_layers_window() -> None:
    """Without a mask, the layer's own `sliding_window` applies: that many keys, the query's own included."""
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    out = huggingface.attention(nn.Identity(), q, k, k, None, sliding_window=3, is_causal=True)[0]
    band = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)
    torch.testing.assert_close(out.transpose(1, 2), F.scaled_dot_product_attention(q, k, k, band, enable_gqa=True))


def test_a_layers_window_on_both_sides() -> None:
    """Without a mask it is as in FlashAttention: as many keys on either side, the query's own counted twice."""
    q = torch.randn(2, 4, 6, 8)
    out = huggingface.attention(nn.Identity(), q, q, q, None, sliding_window=3, is_causal=False)[0]
    band = torch.ones(6, 6, dtype=torch.bool).tril(2).triu(-2)
    torch.testing.assert_close(out.transpose(1, 2), F.scaled_dot_product_attention(q, q, q, band))


def test_softcap_and_sinks() -> None:
    """As Gemma 2's and GPT-OSS' own eager functions compute them."""
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    sinks = torch.randn(4, requires_grad=True)
    found = huggingface.attention(nn.Identity(), q, k, k, None, is_causal=True, softcap=0.7, s_aux=sinks)[0]
    keys = k.repeat_interleave(2, 1)
    s = 0.7 * torch.tanh(q @ keys.mT * 8**-0.5 / 0.7)
    s = s.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    s = torch.cat((s, sinks[:, None, None].expand(2, 4, 6, 1)), -1).softmax(-1)
    wanted = (s[..., :-1] @ keys).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(out.sum(), sinks)[0] for out in (found, wanted)]
    torch.testing.assert_close(*grads)


def test_position_bias_by_distance_and_any_other() -> None:
    """A bias by distance goes to the ops, also where padding is packed away; another goes to sdpa."""
    q = torch.randn(2, 4, 6, 8)
    distances = torch.arange(6)[:, None] - torch.arange(6)
    by_distance = torch.randn(4, 11)[:, distances + 5][None]
    tokens = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)[:, None, None]
    for bias in (by_distance.requires_grad_(), torch.randn(1, 4, 6, 6, requires_grad=True)):
        found = huggingface.attention(nn.Identity(), q, q, q, tokens, position_bias=bias, is_causal=False)[0]
        mask = bias.masked_fill(~tokens, -torch.inf)
        wanted = F.scaled_dot_product_attention(q, q, q, mask).transpose(1, 2)
        held = tokens[:, 0, 0]
        torch.testing.assert_close(found[held], wanted[held])


def test_a_mask_of_four_axes_says_all() -> None:
    """A mask contains the layer's window and causality, so they are not applied a second time to a single query."""
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 3, 8)
    visible = torch.tensor([[True, False, True], [False, False, True]])[:, None, None]
    out = huggingface.attention(nn.Identity(), q, k, k, visible, sliding_window=1, is_causal=True)[0]
    torch.testing.assert_close(out.transpose(1, 2), F.scaled_dot_product_attention(q, k, k, visible))


def test_options_that_the_ops_have_not_are_refused() -> None:
    q = torch.ones(1, 1, 2, 4)
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    for name in ("softcap", "s_aux"):
        with pytest.raises(ValueError, match=f"does not support {name} under a mask"):
            huggingface.attention(nn.Identity(), q, q, q, mask, **{name: 1.0})
    with pytest.raises(ValueError, match="a window on both sides must have as many keys as queries"):
        huggingface.attention(nn.Identity(), q[:, :, :1], q, q, None, is_causal=False, sliding_window=1)
