"""The tables of biases against the formulas of their papers, and where models that have them are installed."""

from __future__ import annotations

import math

import pytest
import torch

import interformer_kernels as ik
from interformer_kernels.nn import RelativePositionBias, TimeBias


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (10, 64)])
def test_t5_buckets_are_those_of_transformers(bidirectional: bool, buckets: int, farthest: int) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    bias = RelativePositionBias(4, farthest, "t5", num_buckets=buckets, bidirectional=bidirectional)
    distances = torch.arange(-farthest, farthest + 1)
    wanted = t5.T5Attention._relative_position_bucket(-distances, bidirectional, buckets, farthest)
    assert torch.equal(bias.index, wanted)
    # Farther keys are in the bucket of the farthest.
    beyond = torch.tensor([-5 * farthest, 5 * farthest])
    ends = t5.T5Attention._relative_position_bucket(-beyond, bidirectional, buckets, farthest)
    assert torch.equal(ends, bias.index[[0, -1]])


def test_alibi_slopes() -> None:
    """The paper's for 8 heads; for 12 those of 8, and every second of 16."""
    eight = [2.0 ** -(h + 1) for h in range(8)]
    assert RelativePositionBias(8, 3, "alibi")()[:, 0].tolist() == pytest.approx([-3 * slope for slope in eight])
    more = [2.0 ** (-0.5 * (h + 1)) for h in range(0, 8, 2)]
    assert RelativePositionBias(12, 1, "alibi")()[:, 2].tolist() == pytest.approx([-s for s in eight + more])


def test_time_buckets_grow_with_the_logarithm() -> None:
    """As HSTU's: `floor(log(max(1, |dt|)) / 0.301)`, the last bucket open."""
    bias = TimeBias(2, num_buckets=40)
    apart = torch.tensor([0, 1, 2, 3, 7, 60, 3600, 86400, 10**7, 10**12])
    found = torch.searchsorted(bias.edges, apart, right=True)
    wanted = [min(math.floor(math.log(max(1, int(t))) / 0.301), 39) for t in apart]
    assert found.tolist() == wanted


@pytest.mark.parametrize("kind", RelativePositionBias.KINDS)
def test_biases_in_attention(kind: str) -> None:
    torch.manual_seed(0)
    position, time = RelativePositionBias(2, 9, kind), TimeBias(1, edges=[0, 5, 20])
    for weight in (*position.parameters(), *time.parameters()):
        torch.nn.init.normal_(weight)
    q, k, v = (torch.randn(9, 2, 4) for _ in range(3))
    offsets, times = torch.tensor([0, 4, 9]), torch.randint(0, 40, (9,))
    out = ik.jagged_attention(q, k, v, offsets, position_bias=position(), times=times, **time())
    for start, end in ((0, 4), (4, 9)):
        i = torch.arange(end - start)
        bias = position()[:, (i[:, None] - i) + 9]
        apart = (times[start:end, None] - times[start:end]).abs()
        bias = bias + time.weight[:, (apart[..., None] >= time.edges).sum(-1)]
        row = (x[start:end].transpose(0, 1) for x in (q, k, v))
        wanted = torch.nn.functional.scaled_dot_product_attention(*row, bias).transpose(0, 1)
        torch.testing.assert_close(out[start:end], wanted)
    weights = [*position.parameters(), *time.parameters()]
    grads = torch.autograd.grad(out.square().sum(), weights)
    assert all(grad.any() for grad in grads)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="kind must be one of distance, t5, alibi"):
        RelativePositionBias(2, 4, "rotary")
    with pytest.raises(ValueError, match="num_buckets must be at least 4"):
        RelativePositionBias(2, 4, "t5", num_buckets=2)
    with pytest.raises(ValueError, match="edges must be ascending"):
        TimeBias(2, edges=[3, 1])


@pytest.mark.parametrize("kind", RelativePositionBias.KINDS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_targets_do_not_see_their_place_where_negative_distances_are_zero(kind: str, bidirectional: bool) -> None:
    torch.manual_seed(0)
    position = RelativePositionBias(2, 9, kind, bidirectional=bidirectional)
    for weight in position.parameters():
        torch.nn.init.normal_(weight)
    q, k, v = (torch.randn(9, 2, 4) for _ in range(3))
    swapped = torch.tensor([0, 1, 2, 3, 4, 5, 8, 7, 6])  # the first and the last of three targets
    offsets, options = torch.tensor([0, 9]), {"causal": True, "num_targets": torch.tensor([3])}
    out = ik.jagged_attention(q, k, v, offsets, position_bias=position(), **options)
    moved = ik.jagged_attention(q[swapped], k[swapped], v[swapped], offsets, position_bias=position(), **options)
    assert torch.allclose(moved[swapped], out, rtol=1e-5, atol=1e-6) is not bidirectional
