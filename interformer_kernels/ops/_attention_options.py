"""Options of attention that are tensors: from a public function's arguments to the fields of a call, and their checks.

Kinds, dtypes, devices and axes follow from the declaration (`_public.py`); here is what only these options ask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels._calls import AttentionCall
from interformer_kernels.ops._public import PublicOp


def seed_tensor(op: PublicOp, seed: object, lead: object) -> Any:
    """`dropout_seed` as a tensor without axes on `lead`'s device; an int is written there without waiting for it."""
    if seed is None or isinstance(seed, Tensor):
        return seed
    number = checks.plain(op.name, "dropout_seed", seed)
    if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
        raise TypeError(f"{op.name}: dropout_seed must be an int or an int64 tensor, found {checks.describe(seed)}")
    if isinstance(number, int) and not -(2**63) <= number < 2**63:
        raise ValueError(f"{op.name}: dropout_seed must fit 64 bits, found {checks.describe(seed)}")
    value: Any = number
    return torch.full((), value, dtype=torch.int64, device=getattr(lead, "device", None))


def pair_of_times(op: PublicOp, times: object, self_attention: bool) -> tuple[Any, Any]:
    """`times` of queries and of keys, which are the same tokens in self attention."""
    if times is None or (self_attention and isinstance(times, Tensor)):
        return times, times
    if not isinstance(times, (tuple, list)) or len(times) != 2:
        either = "an int64 tensor [T], or " if self_attention else ""
        raise TypeError(f"{op.name}: times must be {either}the pair (times_q, times_k); found {checks.describe(times)}")
    return times[0], times[1]


def check_options(op: PublicOp, call: AttentionCall) -> None:
    """Check options against one another."""
    name, softmax = op.name, call.score == "softmax"
    if softmax and call.post_scale != 1:
        raise ValueError(f'{name}: post_scale must be 1 with score="softmax", found {call.post_scale}')
    if (
        call.sinks is None
        and call.position_bias is None
        and call.time_bias is None
        and call.times_q is None
        and call.time_edges is None
        and call.dropout_p == 0
    ):
        return
    if call.sinks is not None and not softmax:
        raise ValueError(f'{name}: sinks must be None unless score="softmax", found {checks.describe(call.sinks)}')
    for bias in ("position_bias", "time_bias"):
        _check_bias(name, bias, getattr(call, bias), call.q.shape[-2])
    if call.position_bias is not None and call.position_bias.shape[1] % 2 == 0:
        found = list(call.position_bias.shape)
        raise ValueError(f"{name}: position_bias must be [Hb, 2 P + 1], of an odd number of distances, found {found}")
    _check_time_bias(name, call)
    _check_dropout(name, call)


def _check_bias(op: str, name: str, bias: Tensor | None, heads: int) -> None:
    if bias is not None and (bias.shape[0] not in (1, heads) or bias.shape[1] < 1):
        wanted = f"[Hb, entries] with Hb = 1 or H = {heads}, and entries"
        raise ValueError(f"{op}: {name} must be {wanted}, found shape {list(bias.shape)}")


def _check_time_bias(op: str, call: AttentionCall) -> None:
    given = {"times": call.times_q, "time_edges": call.time_edges}
    for name, x in given.items():
        if (x is None) != (call.time_bias is None):
            wanted = "None without time_bias" if call.time_bias is None else "given with time_bias"
            raise ValueError(f"{op}: {name} must be {wanted}, found {checks.describe(x)}")
    if call.time_bias is None or call.time_edges is None:
        return
    bins = call.time_bias.shape[1]
    if call.time_edges.shape[0] != bins - 1:
        wanted = f"[N-1] with N = {bins} (from time_bias)"
        raise ValueError(f"{op}: time_edges must be {wanted}, found shape {list(call.time_edges.shape)}")


def _check_dropout(op: str, call: AttentionCall) -> None:
    if call.drops and call.dropout_seed is None:
        wanted = "an int or an int64 tensor where weights are dropped"
        raise ValueError(f"{op}: dropout_seed must be {wanted} (dropout_p={call.dropout_p}), found None")


def without_idle_seed(call: AttentionCall) -> AttentionCall:
    """The call without a seed where nothing is left to chance."""
    return call if call.drops else call._replace(dropout_seed=None)


def check_contents(op: PublicOp, call: AttentionCall) -> None:
    """Check the contents of `num_targets` and `time_edges`, on the host."""
    if call.num_targets is not None:
        most = call.kv_offsets.diff()
        if call.q_offsets is not None:
            most = torch.minimum(most, call.q_offsets.diff())
        wrong = (call.num_targets < 0) | (call.num_targets > most)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            wanted = f"from 0 to {int(most[row])}, the tokens of the row"
            raise ValueError(f"{op.name}: num_targets[{row}] must be {wanted}, found {int(call.num_targets[row])}")
    if call.time_edges is not None:
        wrong = call.time_edges.diff() < 0
        if wrong.any():
            i = int(wrong.nonzero()[0]) + 1
            before, found = int(call.time_edges[i - 1]), int(call.time_edges[i])
            raise ValueError(f"{op.name}: time_edges[{i}] must be at least {before}, the edge before it, found {found}")
