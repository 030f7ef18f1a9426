"""Masks and packed rows of transformers' models are never dropped: served exactly, or refused with a reason."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers (the extra `ecosystem`) is not installed")
import huggingface_models as models  # noqa: E402
from transformers import masking_utils  # noqa: E402

from interformer_kernels.nn import _huggingface_mask as masks  # noqa: E402
from interformer_kernels.nn import huggingface  # noqa: E402

LENGTH, SPLIT = 9, 4
OFFSETS = torch.tensor([0, SPLIT, LENGTH], dtype=torch.int32)
PLACES = torch.cat((torch.arange(SPLIT), torch.arange(LENGTH - SPLIT)))[None]
ROWS: dict[str, Any] = {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 5, "max_length_k": 5}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    huggingface.register()


def ids(rows: int = 1) -> Tensor:
    return torch.randint(3, 60, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def hidden(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **inputs).last_hidden_state


def served(kind: str) -> Any:
    return models.served(models.eager(kind))


# ---------------------------------------------------------------- classes with their own attention code


@pytest.mark.parametrize("kind", ["mpnet", "bloom", "rembert", "big_bird"])
def test_classes_that_attend_by_their_own_code_are_refused_when_loaded(kind: str, tmp_path: Any) -> None:
    model = models.eager(kind)
    with pytest.raises(ValueError, match=f"'interformer' cannot serve {type(model).__name__}: .* code of its own"):
        models.served(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use 'eager', or name the parts to be served"):
        type(model).from_pretrained(tmp_path, attn_implementation="interformer")
    type(model).from_pretrained(tmp_path)


def mask_of(function: Callable[..., Any], padding: Tensor | None = None, size: tuple[int, int] = (2, 6)) -> Any:
    return masks.mask(size[0], size[1], size[1], mask_function=function, attention_mask=padding)


PADDING = torch.tensor([[True, True, True, True, False, False], [False, True, True, True, True, True]])
FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(2),
}


@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_code_that_reads_a_mask_gets_eagers_numbers(name: str, padding: Tensor | None) -> None:
    function = FUNCTIONS[name]
    expected = masking_utils.eager_mask(2, 6, 6, mask_function=function, attention_mask=padding)
    scores = torch.randn(2, 4, 6, 6)
    assert torch.equal(scores + mask_of(function, padding), scores + expected)
    assert torch.equal(mask_of(function, padding)[:, :, 2:4, 1:], expected[:, :, 2:4, 1:])
    assert torch.equal(mask_of(function, padding) == 0, expected == 0)
    q = torch.randn(2, 4, 6, 8)
    actual = F.scaled_dot_product_attention(q, q, q, mask_of(function, padding))
    assert torch.equal(actual, F.scaled_dot_product_attention(q, q, q, expected))
    whole = mask_of(function, padding)[:, :, :, :6]
    assert isinstance(whole, masks.PairMask)
    assert whole.info.form is not None or name == "window"


@pytest.mark.parametrize("view", [lambda m: m, lambda m: m[:, :, 2:3], lambda m: m[:, :, :, :6]])
def test_what_is_written_into_a_mask_counts(view: Callable[[Tensor], Tensor]) -> None:
    mask = mask_of(masking_utils.causal_mask_function)
    q = torch.randn(2, 4, 6, 8)
    view(mask).masked_fill_(torch.arange(6) == 1, -1e30)
    expected = masking_utils.eager_mask(2, 6, 6)
    view(expected).masked_fill_(torch.arange(6) == 1, -1e30)
    out = huggingface.attention(nn.Identity(), q, q, q, mask)[0]
    torch.testing.assert_close(out.transpose(1, 2), F.scaled_dot_product_attention(q, q, q, expected))


def test_a_mask_in_another_precision_is_the_same_mask() -> None:
    """Mixed precision casts the inputs of layers: the mask has its new dtype's minimum, and the ops still serve."""
    mask = mask_of(masking_utils.causal_mask_function, PADDING).to(torch.bfloat16)
    assert isinstance(mask, masks.PairMask)
    assert mask.info.form is not None
    expected = masking_utils.eager_mask(2, 6, 6, attention_mask=PADDING, dtype=torch.bfloat16)
    assert torch.equal(mask + torch.zeros((), dtype=torch.bfloat16), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    """Gradients agree for padded rows in training."""
    mask, result = torch.ones(2, LENGTH, dtype=torch.long), []
    mask[0, :3] = 0
    for checkpointing in (False, True):
        model = served("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        out = model(input_ids=ids(2), attention_mask=mask).last_hidden_state
        out[mask.bool()].square().sum().backward()
        result.append([p.grad for p in model.parameters()])
    for first, second in zip(*result, strict=True):
        torch.testing.assert_close(first, second)


# ---------------------------------------------------------------- packed rows


@pytest.mark.parametrize("rows_by", ["cu_seq_lens", "position_ids", "both"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "gpt_bigcode", "olmo3", "llama4_text"])
def test_packed_rows_stand_alone(kind: str, use_cache: bool, rows_by: str) -> None:
    """This holds for windows shorter than the row and for chunks too, whatever the other row contains."""
    before = models.eager(kind)
    after, tokens = models.served(before), ids()
    rows = {
        **(ROWS if rows_by != "position_ids" else {}),
        **({"position_ids": PLACES} if rows_by != "cu_seq_lens" else {}),
    }
    if kind == "llama4_text" and rows_by == "cu_seq_lens":
        with pytest.raises(ValueError, match="packed rows are not supported with this mask"):
            hidden(after, tokens, use_cache=use_cache, **rows)
        return
    result = hidden(after, tokens, use_cache=use_cache, **rows)
    changed = tokens.clone()
    changed[0, :SPLIT] = 3 + (changed[0, :SPLIT] + 7) % 57
    moved = hidden(after, changed, use_cache=use_cache, **rows)
    assert torch.equal(result[:, SPLIT:], moved[:, SPLIT:])
    if rows_by == "cu_seq_lens" and kind == "gpt_bigcode":  # Its positions are learned, and continue from row to row.
        return
    alone = torch.cat([hidden(before, row) for row in tokens.split((SPLIT, LENGTH - SPLIT), 1)], 1)
    torch.testing.assert_close(result, alone, rtol=1e-4, atol=1e-4)


def test_packed_rows_of_an_encoder() -> None:
    before = models.eager("modernbert")
    after = models.served(before)
    result = hidden(after, ids(), position_ids=PLACES, **ROWS)
    alone = torch.cat([hidden(before, row) for row in ids().split((SPLIT, LENGTH - SPLIT), 1)], 1)
    torch.testing.assert_close(result, alone, rtol=1e-4, atol=1e-4)
    q = torch.randn(1, 4, LENGTH, 8)
    for mask in (None, mask_of(masking_utils.bidirectional_mask_function, size=(1, LENGTH))):
        with pytest.raises(ValueError, match="position_ids restart in bidirectional attention"):
            huggingface.attention(layer(is_causal=False), q, q, q, mask, position_ids=PLACES)


def test_a_mask_of_ones_own_beside_packed_rows() -> None:
    """Masks `[1, 1, L, L]` without and with a masked key are combined with the packed rows."""
    q = torch.randn(1, 4, LENGTH, 8)
    same_row = (torch.arange(LENGTH) >= SPLIT)[:, None] == (torch.arange(LENGTH) >= SPLIT)
    for shown in (torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), (torch.arange(LENGTH) != 1)[None, None, None]):
        of_pairs = shown.expand(1, 1, LENGTH, LENGTH)
        for mask in (shown, torch.zeros(of_pairs.shape).masked_fill(~of_pairs, torch.finfo(torch.float32).min)):
            out = huggingface.attention(nn.Identity(), q, q, q, mask, cu_seq_lens_q=OFFSETS, cu_seq_lens_k=OFFSETS)[0]
            expected = F.scaled_dot_product_attention(q, q, q, of_pairs & same_row)
            torch.testing.assert_close(out.transpose(1, 2), expected)


def filled_cache(model: Any) -> Any:
    return model(input_ids=ids(), use_cache=True).past_key_values


REFUSED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "one of the pair": ("cu_seq_lens_k must be given with", lambda m: hidden(m, ids(), cu_seq_lens_q=OFFSETS)),
    "unequal": (
        "cu_seq_lens_k must be equal to cu_seq_lens_q",
        lambda m: hidden(m, ids(), cu_seq_lens_q=OFFSETS, cu_seq_lens_k=torch.tensor([0, 3, 9])),
    ),
    "too long": ("must be at most 9", lambda m: hidden(m, ids(), cu_seq_lens_q=OFFSETS + 0, cu_seq_lens_k=OFFSETS * 2)),
    "beside a mask": (
        "position_ids restart beside an attention_mask",
        lambda m: hidden(m, ids(), position_ids=PLACES, attention_mask=torch.ones(1, LENGTH, dtype=torch.long)),
    ),
    "a gap": (
        "found a gap",
        lambda m: hidden(m, ids(), position_ids=torch.arange(LENGTH)[None] + 5 * (torch.arange(LENGTH) > 2)),
    ),
    "behind a cache": (
        "queries with a filled or static cache must be of one row",
        lambda m: hidden(m, ids(), position_ids=PLACES + LENGTH, past_key_values=filled_cache(m)),
    ),
    "a token of a row in a cache": (
        "position_ids after a cache of 9 tokens must continue from there, found 5",
        lambda m: hidden(m, ids()[:, :1], position_ids=torch.tensor([[5]]), past_key_values=filled_cache(m)),
    ),
    "cu_seq_lens behind a cache": (
        "found 9 queries over 18 keys",
        lambda m: hidden(m, ids(), past_key_values=filled_cache(m), **{**ROWS, "cu_seq_lens_k": OFFSETS * 2}),
    ),
}


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_cannot_be_kept_apart_are_refused(case: str) -> None:
    message, run = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        run(served("llama"))


@pytest.mark.parametrize("kind", ["stablelm", "nemotron"])
def test_models_that_keep_packed_rows_from_their_attention(kind: str) -> None:
    """Such models accept `cu_seq_lens` and ignore it; rows given by positions are computed as if alone."""
    model = served(kind)
    with pytest.raises(
        ValueError, match=f"{type(model).__name__} does not pass cu_seq_lens_q and cu_seq_lens_k to its"
    ):
        hidden(model, ids(), **ROWS)
    hidden(model, ids())
    first = hidden(model, ids(), position_ids=PLACES)[:, SPLIT:]
    assert torch.equal(
        first, hidden(model, ids().where(torch.arange(LENGTH) >= SPLIT, 5), position_ids=PLACES)[:, SPLIT:]
    )
    with pytest.raises(ValueError, match="does not pass"):
        hidden(copy.deepcopy(model), ids(), **ROWS)


def test_positions_under_the_compiler() -> None:
    """In a graph, rows that restart beside a cache stop the program."""
    model = torch.compile(served("llama"), backend="eager")
    hidden(model, ids(), position_ids=torch.arange(LENGTH)[None])
    with pytest.raises(RuntimeError, match="position_ids must rise by 1"):
        hidden(model, ids(), position_ids=PLACES)


# ---------------------------------------------------------------- layers without a mask


def layer(**attributes: Any) -> Any:
    return SimpleNamespace(**attributes)


@pytest.mark.parametrize("keys", [5, 8, 3])
@pytest.mark.parametrize("attributes", [{}, {"is_causal": False}, {"is_causal": True}], ids=str)
def test_cross_attention_is_not_causal(attributes: dict[str, Any], keys: int) -> None:
    """Without a mask or argument, a causal layer's own attribute applies if there are as many keys as queries."""
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, keys, 8)
    out = huggingface.attention(layer(**attributes), q, k, k, None)[0].transpose(1, 2)
    causal = attributes.get("is_causal", False) and keys == 5
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, k, is_causal=causal))


def test_a_call_that_says_causal() -> None:
    """As in `sdpa`, keys after the queries are masked out; a single query sees all keys."""
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 8, 8)
    out = huggingface.attention(layer(), q, k, k, None, is_causal=True)[0].transpose(1, 2)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, k, is_causal=True))
    single = huggingface.attention(layer(), q[:, :, :1], k, k, None, is_causal=True)[0].transpose(1, 2)
    torch.testing.assert_close(single, F.scaled_dot_product_attention(q[:, :, :1], k, k))
    with pytest.raises(ValueError, match="must have as many keys as queries, found 8 queries over 5 keys"):
        huggingface.attention(layer(), k, q, q, None, is_causal=True)


def test_a_mask_of_two_axes_is_refused() -> None:
    q = torch.randn(3, 1, 3, 4)
    for mask in (torch.ones(3, 3, dtype=torch.bool), torch.ones(3, 1, 3, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"a mask must be \[B, 1, Lq, Lk\], bool or floating"):
            huggingface.attention(layer(), q, q, q, mask)


@pytest.mark.parametrize("name", ["indices", "block_indices", "head_mask", "alibi"])
def test_what_would_change_the_attention_is_refused(name: str) -> None:
    q = torch.ones(1, 1, 2, 4)
    with pytest.raises(ValueError, match=f"does not support {name}"):
        huggingface.attention(layer(), q, q, q, None, **{name: torch.ones(1)})


# ---------------------------------------------------------------- generation


def generated(model: Any, **options: Any) -> Any:
    mask, tokens = torch.ones(3, LENGTH, dtype=torch.long), ids(3)
    mask[0, :3] = mask[1, :1] = 0
    options.update(input_ids=tokens.where(mask.bool(), 0), attention_mask=mask, max_new_tokens=6, min_new_tokens=6)
    return model.generate(
        **options, do_sample=False, return_dict_in_generate=True, output_logits=True, disable_compile=True
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["bart", "mistral", "llama4_text", "gpt2"])
def test_generation(kind: str, cache: str) -> None:
    """Beam search with rows padded on the left. A static cache advances while its mask is in use."""
    with_head = {"bart": transformers.BartForConditionalGeneration, "gpt2": transformers.GPT2LMHeadModel}
    with_head.update(mistral=transformers.MistralForCausalLM, llama4_text=transformers.Llama4ForCausalLM)
    before = models.eager(kind, with_head[kind])
    options = {"num_beams": 2} if cache == "dynamic" else {"cache_implementation": cache}
    expected, actual = (generated(model, **options) for model in (before, models.served(before)))
    assert torch.equal(expected.sequences, actual.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- lower precision


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "bert", "llama4_text"])
def test_padding_in_sixteen_bits(kind: str, precision: str) -> None:
    model = served(kind)
    model = model.bfloat16() if precision == "bfloat16" else model
    context = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
    mask, tokens = torch.ones(2, LENGTH, dtype=torch.long), ids(2)
    mask[0, :3] = 0
    with context:
        result = hidden(model, tokens, attention_mask=mask)[mask.bool()]
        repeated = hidden(model, tokens.where(mask.bool(), 5), attention_mask=mask)[mask.bool()]
    assert result.isfinite().all()
    assert torch.equal(result, repeated)
