"""Launches and bytes of InterFormer's training step beside the attention kernels: predicted, unmeasured.

`PYTHONPATH=tools python -m resources.model_step` runs the step on `meta` and counts PyTorch's operations as a GPU would
start them: bytes are those of inputs and outputs, moved once. `--compiled` has Inductor lower the same step, for the
CPU, whose fusions of elementwise work and sums are much alike, and counts the kernels that it would make.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interformer_kernels._cli.tables import print_table
from resources import bounds

# Seconds that a launch takes at least: of the host in eager mode, of the device in a CUDA graph.
EAGER_LAUNCH, GRAPH_LAUNCH = 4.5e-6, 1.5e-6
OURS = "interformer_kernels"
# Launches of operations that are not one kernel; views and allocations have none.
_LAUNCHES = {
    **dict.fromkeys(("native_layer_norm_backward", "slice_backward", "select_backward"), 2),
    "embedding_dense_backward": 6,  # sorts ids, finds segments, sums them
    **dict.fromkeys(("new_empty", "empty_like", "_record_function_enter_new", "_RecordFunction"), 0),
}
_KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "linear"),
    "layer norm": ("native_layer_norm", "native_layer_norm_backward"),
    "sums over tokens": ("sum",),
    "copies": (
        *("cat", "stack", "clone", "copy_", "_to_copy", "slice_backward", "select_backward", "index_copy_"),
        *("index_select", "index_add", "new_zeros", "index_fill", "_unsafe_view", "unbind"),
    ),
    "embedding": ("embedding", "embedding_dense_backward"),
}
KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}
ELEMENTWISE, SMALL, KERNELS = "elementwise", "rows and weights", "kernels of this package"
FUSED = "fused by Inductor"


@dataclass(frozen=True)
class Work:
    """One operation, or one kernel of Inductor: its kind, its launches, and the bytes that it moves."""

    name: str
    kind: str
    launches: int
    bytes: int


class Counted(TorchDispatchMode):
    """Lists the operations of a step; those whose tensors have fewer than `tokens` entries are small."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.work: list[Work] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view:
            return result
        name = function.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        moved = {id(x): x.numel() * x.element_size() for x in (*inputs, *outputs)}
        if name in ("embedding", "index_select"):  # reads what it writes, not the whole table
            moved[id(inputs[0])] = moved[id(outputs[0])]
        kind = KIND_OF.get(name, ELEMENTWISE)
        if function.namespace == OURS:
            kind = KERNELS
        elif all(x.dim() == 0 or x.shape[0] < self.tokens for x in (*inputs, *outputs)):
            kind = SMALL
        self.work.append(Work(name, kind, _LAUNCHES.get(name, 1), sum(moved.values())))
        return result


def eager(dtype: torch.dtype, rows: int, events: int) -> list[Work]:
    """The operations of a step: forward, loss and backward."""
    model, batch = _model_and_batch(dtype, rows, events, "meta")
    with Counted(rows * events) as counted:
        F.binary_cross_entropy_with_logits(model(batch), batch.label.to(dtype)).backward()
    return counted.work


def compiled(dtype: torch.dtype, rows: int, events: int) -> list[Work]:
    """The kernels that Inductor makes of a step; none is built or run."""
    from torch._functorch.config import patch as autograd_config
    from torch._inductor.config import patch as inductor_config
    from torch._inductor.graph import GraphLowering

    model, batch = _model_and_batch(dtype, rows, events, "cpu")
    work: list[Work] = []

    def list_kernels(graph: Any) -> Any:
        graph.codegen()
        work.extend(one for node in graph.scheduler.nodes if (one := _work_of(node, graph, rows * events)).bytes)
        return SimpleNamespace(call=lambda *args, **kwargs: None)

    # The forward's call fails on the results that it has not got; by then the backward has been lowered, too.
    with (
        mock.patch.object(GraphLowering, "compile_to_module", list_kernels),
        autograd_config(force_non_lazy_backward_lowering=True),
        inductor_config(force_disable_caches=True),  # no other process shall find a program that does nothing
        contextlib.suppress(AttributeError),
    ):
        torch.compile(model, fullgraph=True, dynamic=False)(batch)
    return work


def _work_of(node: Any, graph: Any, tokens: int) -> Work:
    """One of Inductor's kernels, or of its calls to libraries."""
    inner = node.get_nodes()
    names = {dep.name for each in inner for dep in (*each.read_writes.reads, *each.read_writes.writes)}
    name = str(getattr(inner[0].node, "python_kernel_name", None)) if node.is_extern() else FUSED
    kind = FUSED
    if OURS in name:
        kind = KERNELS
    elif not any(_has_tokens(graph, each, tokens) for each in names):
        kind = SMALL
    elif node.is_extern():
        kind = next((KIND_OF[word] for word in name.split(".") if word in KIND_OF), ELEMENTWISE)
    return Work(name, kind, 1, int(node.get_read_write_buffers_sizes()))


def _has_tokens(graph: Any, name: str, tokens: int) -> bool:
    buffer = graph.graph_inputs.get(name) or graph.try_get_buffer(name)
    size = None if buffer is None else buffer.maybe_get_size()
    return bool(size) and int(size[0]) >= tokens


def _model_and_batch(dtype: torch.dtype, rows: int, events: int, device: str) -> tuple[Any, Any]:
    from interformer import InterFormer, InterFormerConfig
    from interformer.testing import random_batch, small_schema

    model = InterFormer(InterFormerConfig(), small_schema()).to(dtype).to(device)
    return model, random_batch(small_schema(), [events] * rows).to(device)


def table(work: Iterable[Work]) -> list[tuple[str, ...]]:
    """A row for each kind, the most bytes first, and one for all."""
    groups: dict[str, list[Work]] = {}
    for one in work:
        groups.setdefault(one.kind, []).append(one)
    ordered = sorted(groups.items(), key=lambda entry: -sum(one.bytes for one in entry[1]))
    return [_row(*entry) for entry in (*ordered, ("all", [one for _, group in ordered for one in group]))]


def _row(kind: str, group: Sequence[Work]) -> tuple[str, ...]:
    launches = sum(one.launches for one in group)
    device = sum(max(one.bytes / bounds.COPY, one.launches * GRAPH_LAUNCH) for one in group)
    moved = sum(one.bytes for one in group)
    return kind, str(launches), f"{moved / 1e9:.2f}", f"{1e6 * device:.0f}", f"{1e6 * launches * EAGER_LAUNCH:.0f}"


COLUMNS = ("kind", "launches", "GB", "us on the device", "us of the host")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of both dtypes."""
    parser = argparse.ArgumentParser(prog="python -m resources.model_step", description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--events", type=int, default=104)
    parser.add_argument("--compiled", action="store_true", help="as torch.compile fuses it")
    parser.add_argument("--operations", action="store_true", help="every operation over tokens by itself")
    options = parser.parse_args(arguments)
    for dtype in (torch.bfloat16, torch.float32):
        work = (compiled if options.compiled else eager)(dtype, options.rows, options.events)
        name = f"{str(dtype).removeprefix('torch.')}, {'compiled' if options.compiled else 'eager'}"
        title = f"{options.rows} rows of {options.events} events, {name}: predicted, unmeasured"
        print_table(title, COLUMNS, table(work))
        for one in work if options.operations else ():
            if one.kind != SMALL:
                print(f"{one.name:48} {one.kind:24} {one.launches} {one.bytes / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
