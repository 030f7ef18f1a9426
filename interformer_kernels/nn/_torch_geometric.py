"""Adapters of torch_geometric's Set Transformer, without padding and with folded projections in its pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn.aggr import SetTransformerAggregation
from torch_geometric.nn.aggr.utils import PoolingByMultiheadAttention

from interformer_kernels.jagged import layout_of_mask
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn._calls import count_served, count_unserved, unsupported_transform
from interformer_kernels.nn._rows import equal_offsets
from interformer_kernels.nn._torch import unsupported_reason
from interformer_kernels.nn.accelerate import register_adapter
from interformer_kernels.nn.pma_pooling import pool_rows
from interformer_kernels.ops.jagged_attention import jagged_attention

_PATH = "torch_geometric's own path"


def _after_attention(block: Any, x: Tensor, attn_out: Tensor) -> Tensor:
    """The part of a `MultiheadAttentionBlock` after its heads: projection, residual, norms, feed-forward."""
    out = shared.project_out(block.attn, attn_out) + x
    out = out if block.layer_norm1 is None else block.layer_norm1(out)
    out = out + block.lin(out).relu()
    return out if block.layer_norm2 is None else block.layer_norm2(out)


def _attend_block(block: Any, x: Tensor, offsets: Tensor) -> Tensor:
    """A `SetAttentionBlock`'s inner block on packed tokens `[T, E]`."""
    drops = shared.dropout_of(block.attn, x.device)
    attn_out = shared.output_only(jagged_attention(*shared.project_self(block.attn, x), offsets, **drops))
    return _after_attention(block, x, attn_out)


def _pool(pooling: Any, x: Tensor, offsets: Tensor) -> Tensor:
    """`PoolingByMultiheadAttention` of packed tokens `[T, E]`: `[B, M, E]`."""
    seeds = pooling.seed[0]
    query = shared.project_query(pooling.mab.attn, seeds)
    return _after_attention(pooling.mab, seeds, pool_rows(pooling.mab.attn, query, F.relu(pooling.lin(x)), offsets))


class FastPoolingByMultiheadAttention(PoolingByMultiheadAttention):
    """`PoolingByMultiheadAttention` of the packed elements where the mask is True."""

    serves = "all calls, but those with a mask under torch.compile"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `PoolingByMultiheadAttention`."""
        reason = unsupported_transform((mask,), (x, *self.parameters()))
        if not reason and mask is not None and torch.compiler.is_compiling():
            reason = "masks under torch.compile"
        if reason:
            count_unserved(self, "PoolingByMultiheadAttention", _PATH, reason)
            return super().forward(x, mask)
        count_served(self)
        if mask is None:
            return _pool(self, x.flatten(0, 1), equal_offsets(x.shape[0], x.shape[1], x.device))
        layout = layout_of_mask(mask)
        return _pool(self, layout.pack(x), layout.offsets)


class FastSetTransformerAggregation(SetTransformerAggregation):
    """`SetTransformerAggregation` that leaves its elements packed, as it is given them."""

    serves = "all calls, unless max_num_elements truncates a set"

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        max_num_elements: int | None = None,
    ) -> Tensor:
        """As `SetTransformerAggregation`."""
        if reason := unsupported_transform((index,), (x, *self.parameters())):
            count_unserved(self, "SetTransformerAggregation", _PATH, reason)
            return super().forward(x, index, ptr, dim_size, dim, max_num_elements=max_num_elements)
        self.assert_index_present(index)
        self.assert_sorted_index(index)
        self.assert_two_dimensional_input(x, dim)
        assert index is not None
        assert dim_size is not None  # `Aggregation.__call__` ensures it.
        offsets = torch.searchsorted(index, torch.arange(dim_size + 1, device=index.device, dtype=index.dtype))
        if int(offsets[-1]) < len(index):
            raise IndexError(f"index must be below dim_size = {dim_size}, found {int(index[-1])}")
        if max_num_elements is not None and dim_size and int(offsets.diff().max()) > max_num_elements:
            count_unserved(self, "SetTransformerAggregation", _PATH, "a set that max_num_elements truncates")
            return super().forward(x, index, ptr, dim_size, dim, max_num_elements=max_num_elements)
        count_served(self)
        for encoder in self.encoders:
            x = _attend_block(encoder.mab, x, offsets)
        x = _pool(self.pma, x, offsets)
        rows, seeds = x.shape[:2]
        flat, seed_offsets = x.flatten(0, 1), equal_offsets(rows, seeds, x.device)
        for decoder in self.decoders:
            flat = _attend_block(decoder.mab, flat, seed_offsets)
        x = flat.unflatten(0, (rows, seeds)).nan_to_num()
        return x.flatten(1, 2) if self.concat else x.mean(dim=1)


def _adapt_pooling(module: Any) -> type[nn.Module] | str:
    return unsupported_reason(module.mab.attn) or FastPoolingByMultiheadAttention


def _adapt_aggregation(module: Any) -> type[nn.Module] | str:
    blocks = [*module.encoders, module.pma, *module.decoders]
    reasons = filter(None, (unsupported_reason(block.mab.attn) for block in blocks))
    return next(reasons, FastSetTransformerAggregation)


register_adapter(PoolingByMultiheadAttention, _adapt_pooling)
register_adapter(SetTransformerAggregation, _adapt_aggregation)
