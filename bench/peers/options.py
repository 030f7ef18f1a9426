"""Peers of attention's options: by rows and on padded rows, by SDPA or eager PyTorch, and FlexAttention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from interformer_bench.peers import buckets, compiled
from torch import Tensor


class Batch(NamedTuple):
    """Packed queries, keys and values `[T, H, D]`, as gradient leaves, and what options are made of."""

    tensors: tuple[Tensor, Tensor, Tensor]
    offsets: Tensor
    times: Tensor

    @property
    def heads(self) -> int:
        """Heads of queries and keys."""
        return self.tensors[0].shape[1]

    def table(self, entries: int) -> Tensor:
        """A bias of all heads, a gradient leaf."""
        return torch.randn(self.heads, entries, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def time(self) -> dict[str, Any]:
        """A bias by time of 32 bins."""
        edges = self.times.new_tensor([int(1.5**n) for n in range(1, 32)])
        return {"time_bias": self.table(32), "times": self.times, "time_edges": edges}


def scores_of(options: dict[str, Any], length: int, heads: int, start: int, targets: int) -> Tensor | None:
    """SDPA's `attn_mask` of a row, `[H, L, L]` or `[L, L]`; None where nothing is added to its scores."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    history = length - targets
    p = i.clamp(max=history)
    left, right = options.get("window", (-1, -1))
    seen = torch.ones(length, length, dtype=torch.bool)
    if options.get("causal"):
        seen &= j <= p
    if left >= 0:
        seen &= j >= p - left
    if right >= 0:
        seen &= j <= p + right
    seen = (seen & (j < history)) | ((i == j) & (i >= history))
    bias: Tensor | None = None
    if (table := options.get("position_bias")) is not None:
        most = table.shape[1] // 2
        bias = table[:, (p - j).clamp(-most, most) + most]
    if (table := options.get("time_bias")) is not None:
        times = options["times"][start : start + length]
        apart = (times[:, None] - times).abs()
        by_time = table[:, torch.searchsorted(options["time_edges"], apart, right=True)]
        bias = by_time if bias is None else bias + by_time
    if bias is not None:
        return bias if bool(seen.all()) else bias.masked_fill(~seen, -torch.inf)
    return None if bool(seen.all()) else torch.zeros(length, length).masked_fill(~seen, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    """`[..., H, L, D]`, by SDPA, or by eager PyTorch with softcap and sinks."""
    softcap, sinks = options.get("softcap", 0.0), options.get("sinks")
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, bias, options.get("dropout_p", 0.0))
    s = q @ k.mT * q.shape[-1] ** -0.5
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if bias is None else s + bias
    if sinks is None:
        return s.softmax(-1) @ v
    s = torch.cat((s, sinks[:, None, None].expand(*s.shape[:-1], 1)), -1)
    return s.softmax(-1)[..., :-1] @ v


def by_row(batch: Batch, options: dict[str, Any]) -> Tensor:
    """One call for each row."""
    outs, targets = [], options.get("num_targets")
    for b, (start, end) in enumerate(zip(batch.offsets.tolist(), batch.offsets[1:].tolist(), strict=False)):
        row = (x[start:end].transpose(0, 1) for x in batch.tensors)
        count = 0 if targets is None else int(targets[b])
        outs.append(attend(*row, scores_of(options, end - start, batch.heads, start, count), options).transpose(0, 1))
    return torch.cat(outs)


def in_one_group(lengths: Sequence[int]) -> list[list[int]]:
    """All rows with tokens, the longest first: padded to the longest."""
    rows = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    return [rows] if rows else []


def grouped(batch: Batch, options: dict[str, Any], grouping: buckets.Grouping) -> Tensor:
    """Each group of rows padded to its own longest; biases by time are those of padded times."""
    groups = buckets.Groups(batch.offsets, len(batch.times), grouping)
    tensors = [[part.transpose(1, 2) for part in groups.pad(x)] for x in batch.tensors]
    targets = options.get("num_targets")
    count = 0 if targets is None else int(targets[0])
    by_distance = {name: x for name, x in options.items() if name not in ("time_bias", "times", "time_edges")}
    outs = []
    for *qkv, times, mask in zip(*tensors, groups.pad(batch.times), groups.masks, strict=True):
        bias = scores_of(by_distance, times.shape[1], batch.heads, 0, count)
        if (table := options.get("time_bias")) is not None:
            apart = (times[:, :, None] - times[:, None]).abs()
            by_time = table[:, torch.searchsorted(options["time_edges"], apart, right=True)].transpose(0, 1)
            bias = by_time if bias is None else by_time + bias
        if mask is not None:
            unseen = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
            bias = unseen if bias is None else bias + unseen
        q, k, v = qkv
        outs.append(attend(q, k, v, bias, options).transpose(1, 2))
    return groups.unpad(outs)


def flex(batch: Batch, options: dict[str, Any]) -> Tensor:
    """FlexAttention on packed tokens, forward only; bins of time differences come from a table."""
    q, k, v = batch.tensors
    lengths = batch.offsets.diff()
    start = torch.repeat_interleave(batch.offsets[:-1], lengths)
    place = torch.arange(len(start)) - start
    targets = options.get("num_targets")
    history = torch.repeat_interleave(lengths if targets is None else lengths - targets, lengths)
    return compiled.flex_jagged(
        q, k, v, batch.offsets, q.shape[-1] ** -0.5, _score_mod(batch, options, place), _within(options, place, history)
    )


def _score_mod(batch: Batch, options: dict[str, Any], place: Tensor) -> compiled.ScoreMod | None:
    # Numbers that a closure holds would be symbols of a dynamic graph, which FlexAttention cannot lower on CPUs.
    if softcap := options.get("softcap", 0.0):
        cap = torch.tensor(softcap)
        return lambda score, b, h, i, j: cap * torch.tanh(score / cap)
    by_place, by_time = options.get("position_bias"), options.get("time_bias")
    if by_place is None and by_time is None:
        return None
    places, times = compiled.fixed(place), compiled.fixed(batch.times)
    if by_time is not None:
        latest = options["time_edges"][-1]
        apart = torch.arange(int(latest) + 1)
        bins = compiled.fixed(torch.searchsorted(options["time_edges"], apart, right=True), len(apart))
        of_time = compiled.fixed(by_time.detach(), len(by_time))
    if by_place is not None:
        longest = torch.tensor(by_place.shape[1] // 2)
        of_place = compiled.fixed(by_place.detach(), len(by_place))

    def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if by_place is not None:
            score = score + of_place[h, (places[i] - places[j] + longest).clamp(min=0).minimum(2 * longest)]
        if by_time is not None:
            score = score + of_time[h, bins[(times[i] - times[j]).abs().minimum(latest)]]
        return score

    return add


def _within(options: dict[str, Any], place: Tensor, history: Tensor) -> compiled.Within | None:
    """The mask of a causal window and targets; None where rows see all of themselves."""
    left, right = options.get("window", (-1, -1))
    if not options.get("causal") and right != 0:
        return None
    p = torch.minimum(place, history)
    packed = torch.arange(len(place))
    lowest = (p - left).clamp(min=0) if left >= 0 else torch.zeros_like(p)
    places, reaches, lows, histories = (compiled.fixed(x) for x in (place, p, lowest, history))

    def seen(i: Tensor, j: Tensor) -> Tensor:
        in_history = (places[j] < histories[j]) & (places[j] <= reaches[i]) & (places[j] >= lows[i])
        return in_history | (i == j)

    return compiled.Within(seen, packed - place + lowest, causal=True)
