"""Each published form equals its formula, and the identities between the forms hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interformer import InterFormer
from interformer.batch import Batch, Layout
from interformer.cross import PMA, MeanSummary, SeedProducts
from interformer.feed_forward import GDPAFeedForward, MLPFeedForward, RankFeedForward, TwoLayerFeedForward
from interformer.sequence import SelfAttention
from interformer.testing import random_batch, small_schema
from small_model import SMALL, assert_equal_sums
from torch import Tensor, nn

from interformer_kernels import gated_cross_attention

OFFSETS = torch.tensor([0, 2, 2, 7])


def _tokens() -> Tensor:
    return torch.randn(7, 8, dtype=torch.float64)


def _x_sum() -> Tensor:
    return torch.randn(3, SMALL.num_cls, 8, dtype=torch.float64)


# ---------------------------------------------------------------- the personalised feed-forward


def test_mlp_feed_forward_is_equation_8() -> None:
    layer, tokens, x_sum = MLPFeedForward(SMALL).double(), _tokens(), _x_sum()
    weight = layer.generate.mlp(x_sum.flatten(1)).view(3, 8, 8)
    rows = [tokens[OFFSETS[b] : OFFSETS[b + 1]] @ weight[b] for b in range(3)]
    assert_equal_sums(layer(tokens, x_sum, OFFSETS), torch.cat(rows))


def test_rank_feed_forward_is_attention_with_identity_score() -> None:
    """Appendix A.2.2: `(s_t W) X_sum` is attention with identity score, scale 1, keys `W`, values `X_sum`."""
    layer = RankFeedForward(SMALL).double()
    tokens, x_sum = _tokens(), _x_sum()
    keys = layer.weight.T.expand(3, -1, -1).flatten(0, 1)[:, None]  # [B*S, 1, E]
    key_offsets = SMALL.num_cls * torch.arange(4)
    attn_out = gated_cross_attention(
        tokens[:, None], keys, x_sum.flatten(0, 1)[:, None], key_offsets, q_offsets=OFFSETS, score="identity", scale=1.0
    )
    assert_equal_sums(layer(tokens, x_sum, OFFSETS), attn_out[:, 0])


def test_two_layer_feed_forward_is_its_formula() -> None:
    layer, tokens, x_sum = TwoLayerFeedForward(SMALL).double(), _tokens(), _x_sum()
    into, into_bias, out_of, out_of_bias = layer.generate.mlp(x_sum.flatten(1)).split((40, 5, 40, 8), 1)
    rows = []
    for b in range(3):
        hidden = tokens[OFFSETS[b] : OFFSETS[b + 1]] @ into[b].view(8, 5) + into_bias[b]
        rows.append(nn.functional.gelu(hidden) @ out_of[b].view(5, 8) + out_of_bias[b])
    assert_equal_sums(layer(tokens, x_sum, OFFSETS), layer.norm(torch.cat(rows)))


def test_two_layer_without_norm_is_gdpa_of_one_head() -> None:
    """With zero biases and tau = 1, the columns of `W1` are the keys and the rows of `W2` the values."""
    one_head = replace(SMALL, num_heads=1)
    two_layer, gdpa = TwoLayerFeedForward(one_head).double(), GDPAFeedForward(one_head).double()
    two_layer.norm = nn.Identity()
    source, target = two_layer.generate.mlp, gdpa.generate.mlp
    with torch.no_grad():
        for linear, part in zip(source, target, strict=True):
            if isinstance(linear, nn.Linear) and linear is not source.last:
                part.weight.copy_(linear.weight)
                part.bias.copy_(linear.bias)
        pieces = torch.cat((source.last.weight, source.last.bias[:, None]), 1).split((40, 5, 40, 8))
        for bias in (pieces[1], pieces[3]):
            bias.zero_()
        source.last.weight.copy_(torch.cat(pieces)[:, :-1])
        source.last.bias.copy_(torch.cat(pieces)[:, -1])
        keys = pieces[0].view(8, 5, -1).transpose(0, 1).flatten(0, 1)
        target.last.weight.copy_(torch.cat((keys, pieces[2]))[:, :-1])
        target.last.bias.copy_(torch.cat((keys, pieces[2]))[:, -1])
    tokens, x_sum = _tokens(), _x_sum()
    assert_equal_sums(two_layer(tokens, x_sum, OFFSETS), gdpa(tokens, x_sum, OFFSETS))


@pytest.mark.parametrize("literal", [False, True])
def test_gdpa_feed_forward_is_its_formula(literal: bool) -> None:
    """Per head `gelu(s W1 / tau) W2`; the module adds the residual only if the Sequence Arch has none."""
    layer = GDPAFeedForward(replace(SMALL, pffn_tau=2.0, literal=literal)).double()
    tokens, x_sum = _tokens(), _x_sum()
    keys, values = (piece.view(3, 5, 2, 4) for piece in layer.generate.mlp(x_sum.flatten(1)).split((40, 40), 1))
    rows = []
    for b in range(3):
        s = tokens[OFFSETS[b] : OFFSETS[b + 1]].view(-1, 2, 4)
        scores = torch.einsum("thd,fhd->thf", s, keys[b]) / 2.0
        rows.append(torch.einsum("thf,fhd->thd", nn.functional.gelu(scores), values[b]).flatten(1))
    expected = torch.cat(rows)
    assert_equal_sums(layer(tokens, x_sum, OFFSETS), tokens + expected if literal else expected)


# ---------------------------------------------------------------- summaries


def test_pma_is_cross_attention_with_broadcast_queries() -> None:
    pma, tokens = PMA(SMALL, 3).double(), _tokens()
    queries = pma.query(pma.seeds).view(3, 2, 4).expand(3, -1, -1, -1)  # [B, M, H, D]
    k, v = pma.key_value(tokens).view(7, 2, 2, 4).unbind(1)
    attn_out = gated_cross_attention(queries, k, v, OFFSETS)
    assert_equal_sums(pma(tokens, OFFSETS), pma.out(attn_out.flatten(-2)))


def test_mab_is_set_transformers() -> None:
    """Comparison with the formula, row by row; an empty row has zero output."""
    pma, tokens = PMA(replace(SMALL, pma="mab"), 3).double(), _tokens()
    query = pma.query(pma.seeds)
    rows = []
    for b in range(3):
        k, v = pma.key_value(tokens[OFFSETS[b] : OFFSETS[b + 1]]).view(-1, 2, 2, 4).unbind(1)
        scores = torch.einsum("mhd,lhd->hml", query.view(3, 2, 4), k) / 8**0.5
        attn_out = torch.einsum("hml,lhd->mhd", scores.softmax(-1), v).flatten(1)
        hidden = pma.attention_norm(query + attn_out)
        rows.append(pma.out_norm(hidden + torch.relu(pma.out(hidden))))
    assert_equal_sums(pma(tokens, OFFSETS), torch.stack(rows))


def test_hierarchical_seeds_are_a_sum_of_products() -> None:
    layer = SeedProducts(replace(SMALL, pool_seeds=6, pool_products=3)).double()
    pooled = torch.randn(4, 6, 8, dtype=torch.float64)
    expected = torch.einsum("rms,bse,ref->bmf", layer.left, pooled, layer.right)
    assert_equal_sums(layer(pooled), expected)


@pytest.mark.parametrize("kind", ["mean", "mlp", "mha"])
def test_simple_summaries_are_gated_means(kind: str) -> None:
    summary = MeanSummary(replace(SMALL, summary=kind)).double()
    tokens = _tokens()
    layout = Layout.from_offsets(torch.tensor([0, 2, 2, 7]), 7, num_cls=0, num_recent=0)
    inner = {"mean": lambda x: x, "mlp": getattr(summary, "mlp", None), "mha": None}[kind]
    mapped = summary.attention(tokens, OFFSETS) if inner is None else inner(tokens)
    means = [mapped[OFFSETS[b] : OFFSETS[b + 1]].sum(0) / max(int(OFFSETS[b + 1] - OFFSETS[b]), 1) for b in range(3)]
    assert_equal_sums(summary(tokens, layout), summary.gate(torch.stack(means)[:, None]))


# ---------------------------------------------------------------- the window


def test_a_wide_window_is_no_window() -> None:
    torch.manual_seed(3)
    wide, none = SelfAttention(replace(SMALL, window=(9, 9)), 1).double(), SelfAttention(SMALL, 1).double()
    wide.load_state_dict(none.state_dict())
    tokens = _tokens()
    assert_equal_sums(wide(tokens, OFFSETS), none(tokens, OFFSETS))


def test_under_a_window_only_neighbours_and_the_prefix_are_seen() -> None:
    attention = SelfAttention(replace(SMALL, window=(1, 1)), num_prefix=1).double()
    offsets, tokens = torch.tensor([0, 7]), _tokens()
    before = attention(tokens, offsets)
    for changed in range(7):
        moved_tokens = tokens.clone()
        moved_tokens[changed] += 1
        moved = (attention(moved_tokens, offsets) - before).abs().amax(1) > 1e-9
        sees = [i == 0 or changed == 0 or abs(i - changed) <= 1 for i in range(7)]
        assert moved.tolist() == sees


# ---------------------------------------------------------------- exchange between the sides


def _changed_summaries(flow: str, change: Batch, base: Batch) -> tuple[bool, bool]:
    """Whether `X_sum` and `S_sum` of the head's Cross Arch differ between two batches."""
    torch.manual_seed(0)
    model = InterFormer(replace(SMALL, flow=flow), small_schema()).double()

    def summaries(batch: Batch) -> tuple[Tensor, Tensor]:
        tokens = model._both_sides(model.embedding.tokens(batch), batch)
        return tokens[:, : SMALL.num_cls], tokens[:, SMALL.num_cls :]

    pairs = zip(summaries(base), summaries(change), strict=True)
    x_moved, s_moved = (not torch.equal(a, b) for a, b in pairs)
    return x_moved, s_moved


@pytest.mark.parametrize(
    ("flow", "to_static", "to_sequence"),
    [("int", True, True), ("n2s", False, True), ("s2n", True, False), ("sep", False, False)],
)
def test_a_flow_is_who_hears_whom(flow: str, to_static: bool, to_sequence: bool) -> None:
    base = random_batch(small_schema(), (5, 9))
    other_history = replace(base, sequences=1 - base.sequences.clamp(max=1))
    other_static = replace(base, dense=base.dense + 1)
    assert _changed_summaries(flow, other_history, base) == (to_static, True)
    assert _changed_summaries(flow, other_static, base) == (True, to_sequence)


def test_sole_does_not_read_the_history() -> None:
    model = InterFormer(replace(SMALL, flow="sole"), small_schema())
    base = random_batch(small_schema(), (5, 9))
    assert torch.equal(model(base), model(replace(base, sequences=1 - base.sequences.clamp(max=1))))
    assert "opinion" not in model.embedding.tables


def test_event_fields_choose_what_is_read_of_an_event() -> None:
    model = InterFormer(replace(SMALL, event_fields=("category", "item")), small_schema())
    base = random_batch(small_schema(), (5, 9))
    sequences = base.sequences.clone()
    sequences[:, 2] = 1 - sequences[:, 2]
    assert torch.equal(model(base), model(replace(base, sequences=sequences)))
    sequences[:, 0] = (sequences[:, 0] + 1) % 23
    assert not torch.equal(model(base), model(replace(base, sequences=sequences)))
    with pytest.raises(ValueError, match="event_fields must be among item, category, opinion; found 'price'"):
        InterFormer(replace(SMALL, event_fields=("price",)), small_schema())
