"""`PMAPooling`, folded and unfolded, compared with PyTorch's attention and Set Transformer's; the cost rule."""

from __future__ import annotations

from typing import Any

import module_budget as budget
import pytest
import torch
import torch.nn.functional as F
from module_budget import perturbed
from torch import Tensor, nn

from interformer_kernels.nn import PMAPooling
from interformer_kernels.ops.pma_folded import FOLDED_SHARE, folding_wins
from interformer_kernels.testing import offsets_of

E, H, M = 16, 4, 2
LENGTHS = (5, 0, 3)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 12}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", ["right", "holes", "a row of padding"])
def test_pooling_is_pytorchs(kind: str, options: dict[str, Any], fold: bool) -> None:
    """`module(seeds, x, x)` of `nn.MultiheadAttention`, with and without folded projections."""
    original = perturbed(nn.MultiheadAttention(E, H, **options))
    original.register_parameter("seeds", nn.Parameter(torch.randn(M, E)))
    pooling = PMAPooling.from_torch(original, original.seeds, fold=fold)
    padding = budget.padding(kind)

    def run(module: Any, inputs: Any) -> Tensor:
        x = inputs["x"]
        if module is pooling:
            return module(x, key_padding_mask=padding)
        seeds = module.seeds[:, None].expand(-1, 3, -1)
        return module(seeds, x, x, key_padding_mask=padding, need_weights=False)[0]

    budget.assert_within_budget(original, pooling, lambda seed: budget.draw(seed, x=(6, 3, original.kdim)), run)


class SetTransformerPMA(nn.Module):
    """Set Transformer's PMA as in its authors' code (`MAB` of the seeds), reimplemented for padded sets."""

    def __init__(self, pooling: PMAPooling) -> None:
        super().__init__()
        self.seeds, self.in_proj_weight, self.in_proj_bias = pooling.seeds, pooling.in_proj_weight, pooling.in_proj_bias
        self.out_proj, self.attention_norm, self.out_norm = pooling.out_proj, pooling.attention_norm, pooling.out_norm

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        projections = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(y, *p) for y, p in zip((self.seeds, x, x), projections, strict=True))
        q = q.expand(len(x), -1, -1)
        heads = [torch.cat(y.split(E // H, -1), 0) for y in (q, k, v)]
        scores = heads[0] @ heads[1].transpose(1, 2) / E**0.5
        weights = scores.masked_fill(~tokens.repeat(H, 1)[:, None], -torch.inf).softmax(-1)
        out = torch.cat((heads[0] + weights @ heads[2]).split(len(x), 0), -1)
        out = out if self.attention_norm is None else self.attention_norm(out)
        out = out + F.relu(self.out_proj(out))
        return out if self.out_norm is None else self.out_norm(out)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_set_transformers_form(layer_norm: bool, fold: bool) -> None:
    pooling = perturbed(PMAPooling(E, H, M, batch_first=True, set_transformer=True, layer_norm=layer_norm, fold=fold))
    original = SetTransformerPMA(pooling)
    tokens = ~budget.padding("holes")

    def run(module: Any, inputs: Any) -> Tensor:
        return module(inputs["x"], key_mask=tokens) if module is pooling else module(inputs["x"], tokens)

    budget.assert_within_budget(original, pooling, lambda seed: budget.draw(seed, x=(3, 6, E)), run)


@pytest.mark.parametrize("set_transformer", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folded_is_unfolded(set_transformer: bool, bias: bool) -> None:
    """Rows without tokens included; the value bias is added to the other rows only."""
    pooling = perturbed(PMAPooling(E, H, M, bias=bias, set_transformer=set_transformer, fold=False))
    folded = PMAPooling(E, H, M, bias=bias, set_transformer=set_transformer, fold=True)
    folded.load_state_dict(pooling.state_dict())
    offsets = offsets_of((5, 0, 37, 1, 8))

    def run(module: Any, inputs: Any) -> Tensor:
        return module(inputs["x"], offsets=offsets)

    budget.assert_within_budget(pooling, folded, lambda seed: budget.draw(seed, x=(51, E)), run)


def test_the_rule_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the threshold and above it, `fold=None` equals `fold=True` and `fold=False`, bit for bit."""
    max_seeds = int(FOLDED_SHARE * E) // H
    assert folding_wins(max_seeds * H, E)
    assert not folding_wins((max_seeds + 1) * H, E)
    x, offsets = torch.randn(8, E), offsets_of(LENGTHS)
    for seeds, folds in ((max_seeds, True), (max_seeds + 1, False)):
        module = perturbed(PMAPooling(E, H, seeds))
        chosen = module(x, offsets=offsets)
        same, opposite = (setattr(module, "fold", fold) or module(x, offsets=offsets) for fold in (folds, not folds))
        assert torch.equal(chosen, same)
        assert not torch.equal(chosen, opposite)
