"""Transformers' classes with `attn_implementation="interformer"` ignore padding and other rows, or raise an error.

Every class is called as by its users, with its default arguments (and the cache that models create by default). A
fixed sample of classes is tested; with EVERY=1 all of transformers' text models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers (the extra `ecosystem`) is not installed")
import huggingface_models as models  # noqa: E402
from every import EVERY  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES  # noqa: E402

from interformer_kernels.nn import huggingface  # noqa: E402


def words(text: str) -> list[str]:
    return text.split()


DECODERS = words("""
llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox gptj opt biogpt
xglm codegen gpt_bigcode stablelm starcoder2 olmo olmo2
olmo3 cohere cohere2 granite granitemoe mixtral qwen2_moe qwen3_moe
llama4_text glm glm4 glm4_moe ernie4_5 modernbert-decoder nemotron persimmon
helium smollm3 exaone4 hunyuan_v1_dense hunyuan_v1_moe
arcee apertus bitnet diffllama doge flex_olmo ministral ministral3 seed_oss vaultgemma phimoe olmoe jetmoe jais2
granitemoeshared solar_open afmoe nanochat cwm ernie4_5_moe lfm2 minimax ctrl gpt_oss mimo_v2_flash bloom falcon mpt
openai-gpt""")
ENCODERS = words("""bert roberta albert electra distilbert xlm-roberta ernie camembert data2vec-text xlm-roberta-xl
roberta-prelayernorm modernbert nomic_bert esm layoutlm markuplm splinter bert-generation eurobert clip_text_model
deberta mpnet megatron-bert rembert roformer convbert squeezebert ibert nystromformer big_bird longformer""")
BOTH = words("""bart mbart pegasus marian m2m_100 t5 umt5 blenderbot blenderbot-small plbart bigbird_pegasus longt5
switch_transformers nllb-moe mvp led prophetnet""")
SAMPLE = [*DECODERS, *ENCODERS, *BOTH]
OTHERS = [kind for kind in MODEL_MAPPING_NAMES if kind not in SAMPLE] if EVERY else []
# The sample's classes that are refused, and why; all others are served.
OWN_CODE = "has attention code of its own"
REFUSED = {
    **dict.fromkeys(("bloom", "falcon", "mpt", "xglm", "openai-gpt", "deberta", "mpnet", "megatron-bert"), OWN_CODE),
    **dict.fromkeys(("rembert", "roformer", "convbert", "squeezebert", "ibert", "nystromformer", "big_bird"), OWN_CODE),
    **dict.fromkeys(("longformer", "mvp", "led", "prophetnet"), OWN_CODE),
}
# These create an `attention_mask` of ones if none is given; with a mask, positions do not mark packed rows.
MASKED = ("biogpt",)
# These do not pass `cu_seq_lens` to their attention.
KEEPS_ROWS = ("stablelm", "nemotron")
# Layers other than attention carry state from row to row of a packed batch.
CARRIES = ("lfm2", "minimax")
LENGTH, SPLIT = 9, 4
PADDED = {"left": (0, 0, 0, 0, 1, 1, 1, 1, 1), "right": (1, 1, 1, 1, 1, 0, 0, 0, 0)}
Run = Callable[[Any, Tensor], Tensor]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    huggingface.register()


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def replaced(tokens: Tensor) -> Tensor:
    """Ids that all differ from the given ones."""
    return 3 + (tokens - 3 + 7) % 57


def call(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    """The last hidden states of a call with these arguments and defaults otherwise."""
    if "decoder_input_ids" in signature(model):
        inputs.setdefault("decoder_input_ids", ids(1)[: len(tokens)])
    torch.manual_seed(3)  # For dropout.
    with torch.no_grad():
        return model(input_ids=tokens, **inputs)[0]


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def assert_as_eager(before: Any, after: Any, run: Run, run_eager: Run | None = None) -> None:
    """The error budget of a whole model: 2 x eager's error against float64, plus a rounding unit for each layer."""
    with models.exact_softmax():
        truth = (run_eager or run)(models.truth(before), ids())
    rough = (run_eager or run)(before.float(), ids())
    result = run(after, ids())
    units = 4 * torch.finfo(torch.float32).eps * rms(truth)
    assert rms(result - truth) <= 2 * rms(rough - truth) + units, (rms(result - truth), rms(rough - truth), units)


def moved_and_allowed(model: Any, run: Run, place: Any) -> tuple[float, float]:
    """The change of `run`'s result by other tokens at `place`, and the allowed change: not one bit.

    Experts multiply all tokens routed to them in one product, whose rounding depends on their number: with experts, in
    float64, the result may change by less than a rounding unit of float32.
    """
    experts = any("expert" in name for name, _ in model.named_modules())
    model = model.double() if experts else model
    tokens = ids()
    first = run(model, tokens)
    tokens[place] = replaced(tokens[place])
    moved = float((first - run(model, tokens)).abs().max())
    model.float()
    return moved, torch.finfo(torch.float32).eps * float(first.abs().max()) if experts else 0.0


def assert_unmoved(model: Any, run: Run, place: Any) -> None:
    moved, allowed = moved_and_allowed(model, run, place)
    assert moved <= allowed, (moved, allowed)


def padded(side: str, before: Any, after: Any) -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0] = torch.tensor(PADDED[side])
    decoder = hasattr(before, "decoder") and hasattr(before, "encoder")
    compared = torch.ones(2, LENGTH, dtype=torch.bool) if decoder else mask.bool()

    def run(model: Any, tokens: Tensor) -> Tensor:
        return call(model, tokens, attention_mask=mask)[compared]

    assert_as_eager(before, after, run)
    assert_unmoved(after, run, ~mask.bool())


def full(before: Any, after: Any) -> None:
    """Without a mask, a causal model's outputs do not depend on later tokens."""
    assert_as_eager(before, after, call)
    kind = before.config.model_type
    if kind in DECODERS:
        assert_unmoved(after, lambda model, tokens: call(model, tokens)[:, :-1], (slice(None), -1))


def cached(before: Any, after: Any) -> None:
    """Several tokens, then one, then two at once, with a cache and rows padded on the left."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :2] = 0

    def run(model: Any, tokens: Tensor) -> Tensor:
        cache, result = None, []
        name = "cache" if "cache" in signature(model) else "past_key_values"
        for start, stop in ((0, 6), (6, 7), (7, 9)):
            with torch.no_grad():
                out = model(tokens[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **{name: cache})
            cache = out.past_key_values
            result.append(out[0])
        return torch.cat(result, 1)[mask.bool()]

    assert_as_eager(before, after, run)
    assert_unmoved(after, run, ~mask.bool())


def packed(rows_by: str, before: Any, after: Any) -> None:
    """Two packed rows are computed as if each were alone."""
    lengths = (SPLIT, LENGTH - SPLIT)
    rows: dict[str, Any] = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    if rows_by != "position_ids":
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        rows.update(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=5, max_length_k=5)
    if rows_by == "cu_seq_lens":
        del rows["position_ids"]

    def run(model: Any, tokens: Tensor) -> Tensor:
        return call(model, tokens[:1], **rows)

    def alone(model: Any, tokens: Tensor) -> Tensor:
        return torch.cat([call(model, row) for row in tokens[:1].split(lengths, 1)], 1)

    if rows_by != "cu_seq_lens":  # Learned positions continue from row to row unless they are given.
        assert_as_eager(before, after, run, alone)
    assert_unmoved(after, lambda model, tokens: run(model, tokens)[:, SPLIT:], (slice(None), slice(SPLIT)))
    assert_unmoved(after, lambda model, tokens: run(model, tokens)[:, :SPLIT], (slice(None), slice(SPLIT, None)))


def trained(before: Any, after: Any) -> None:
    """The config's dropout is used."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 5:] = 0
    after.train()
    assert_unmoved(after, lambda model, tokens: call(model, tokens, attention_mask=mask)[:, :5], ~mask.bool())
    after.eval()


def check(kind: str) -> None:
    before = models.eager(kind)
    after = models.served(before)
    full(before, after)
    for side in PADDED:
        padded(side, before, after)
    if kind not in BOTH:
        trained(before, after)
    if kind in DECODERS:
        cached(before, after)
    if kind in BOTH or kind in CARRIES:
        return
    refused = {
        **dict.fromkeys(KEEPS_ROWS, "does not pass cu_seq_lens_q"),
        "llama4_text": "not supported with this mask",
    }
    if kind in refused:
        with pytest.raises(ValueError, match=refused[kind]):
            packed("cu_seq_lens", before, after)
    else:
        packed("cu_seq_lens", before, after)
    if kind in MASKED:
        with pytest.raises(ValueError, match="position_ids restart beside an attention_mask"):
            packed("position_ids", before, after)
    elif kind in DECODERS:
        packed("position_ids", before, after)
        if kind not in KEEPS_ROWS:
            packed("both", before, after)


@pytest.mark.parametrize("kind", SAMPLE)
def test_neighbours_and_padding_do_not_matter(kind: str) -> None:
    if kind in REFUSED:
        with pytest.raises(ValueError, match=f"attn_implementation='interformer' .*{REFUSED[kind]}"):
            call(models.served(models.eager(kind)), ids())
        return
    check(kind)


def test_the_sample_is_large_enough() -> None:
    assert len(SAMPLE) - len(REFUSED) >= 60


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_class(kind: str) -> None:
    """Only where transformers' eager attention is right: other layers may depend on padding and on other rows."""
    try:
        if models.parameters(kind) > 1e6:
            pytest.skip("not tiny by the names of sizes known here")
        before = models.eager(kind)
        if call(before, ids()).shape[:2] != (2, LENGTH):
            pytest.skip("does not answer for each token")
    except Exception as error:
        pytest.skip(f"does not run by itself: {str(error)[:200]}")
    try:
        after = models.served(before)
        call(after, ids())
    except ValueError as error:
        if "attn_implementation='interformer'" not in str(error):
            raise
        return
    assert_as_eager(before, after, call)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    for tokens in PADDED.values():
        mask[0] = torch.tensor(tokens)
        compared = torch.ones_like(mask, dtype=torch.bool) if "decoder_input_ids" in signature(before) else mask.bool()

        def run(model: Any, tokens: Tensor, compared: Tensor = compared) -> Tensor:
            return call(model, tokens, attention_mask=mask)[compared]

        if below(moved_and_allowed(before, run, ~mask.bool())):
            assert_as_eager(before, after, run)
            assert_unmoved(after, run, ~mask.bool())
    places = torch.cat((torch.arange(SPLIT), torch.arange(LENGTH - SPLIT)))[None]
    if "position_ids" not in signature(before) or "use_cache" not in signature(before):
        return

    def second(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
        return call(model, tokens[:1], position_ids=places, **inputs)[:, SPLIT:]

    first_row = (slice(None), slice(SPLIT))
    if below(moved_and_allowed(before, lambda m, tokens: second(m, tokens, use_cache=False), first_row)):
        assert_unmoved(after, second, first_row)


def signature(model: Any) -> Any:
    return inspect.signature(model.forward).parameters


def below(pair: tuple[float, float]) -> bool:
    return pair[0] <= pair[1]
