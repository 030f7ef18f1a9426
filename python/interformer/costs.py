"""The cost of scoring a candidate, in floating-point operations."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from interformer.data.clicks import Clicks


def flops_per_candidate(model: nn.Module, clicks: Clicks, candidates: int, device: torch.device | str = "cpu") -> float:
    """FLOPs of one candidate's logit where a request has so many, by PyTorch's counter: two for a product and its sum.

    The request is that of the impression whose history has the median length, its candidates copies of this impression.
    Look-ups, norms and activations are not counted. A model that reads a request once divides its history's cost by
    `candidates`; for other models, and clicks without requests, the number of candidates hardly matters.
    """
    median = clicks.lengths.argsort()[len(clicks) // 2]
    batch = clicks.batch(median.repeat(candidates)).to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch)
    model.train(was_training)
    return counter.get_total_flops() / candidates
