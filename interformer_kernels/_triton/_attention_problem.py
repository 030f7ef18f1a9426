"""A call of the attention family made ready for the kernels: tensors, tiles, and the groups of arguments."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from interformer_kernels._calls import AttentionCall
from interformer_kernels._launch import splits
from interformer_kernels._launch.plans import any_facts, facts_of
from interformer_kernels._launch.rotary import rotated_before
from interformer_kernels._launch.tensors import readable
from interformer_kernels._triton import _programs, _run, _tiles
from interformer_kernels._triton._arguments import (
    GateOperand,
    GateOptions,
    KeyOperand,
    KeysAndValues,
    Offsets,
    QueryOperand,
    Rope,
    RopeOptions,
    Shape,
    ShortShape,
)
from interformer_kernels._triton._attention_geometry import geometry
from interformer_kernels._triton._attention_scores import VariantInputs, VariantOptions
from interformer_kernels._triton._bound import Known
from interformer_kernels._triton._programs import Programs, Side, Splits, TileLists, splits_by_marks, splits_of
from interformer_kernels._triton._rows import slots
from interformer_kernels._triton._tiles import Tiles
from interformer_kernels._triton.apply_rotary import rope_operand, rotated

_SCALES = 2.0**-100, 2.0**100  # that kernels of 16 bits take as they are
_NO_ROPE = RopeOptions(0, False, False, False)


class Problem:
    """Tensors that kernels read in place, sizes, and the arguments that kernels have in common."""

    def __init__(self, call: AttentionCall, backward: bool = False, has_grad_lse: bool = False) -> None:
        self.call, self.backward = call, backward
        self.known: Known | None = None  # of the kernels of calls like this one
        self.out_shape = call.out_shape()
        kv_offsets = readable(call.kv_offsets)
        q_offsets = kv_offsets if call.q_offsets is None else readable(call.q_offsets)
        self.offsets = Offsets(q_offsets, kv_offsets)
        q, k, v = call.q, call.k, call.k if call.v is None else call.v
        self.rows, self.heads = call.kv_offsets.shape[0] - 1, q.shape[-2]
        self.k_tokens, self.kv_heads, channels = k.shape
        # Query tokens of all rows as outputs are numbered, and of one row where all rows have the same number.
        self.queries = 0 if call.layout == "packed" else self.out_shape[1]
        self.tokens = self.out_shape[0] if call.layout == "packed" else self.out_shape[0] * self.queries
        # Kernels of short and of whole rows know no dropout and no bias, and make no statistics of their queries, by
        # which sinks get gradients; they choose rows by the number of queries, too.
        drops, biased = call.drops, call.position_bias is not None or call.time_bias is not None
        tiled = call.queries_apart or call.dropout_p > 0 or biased or (backward and call.sinks is not None)
        option = (
            "biases" if biased else "dropout" if drops else "targets" if call.num_targets is not None
            else "capped" if call.softcap > 0 or call.sinks is not None else "grad_lse" if has_grad_lse else ""
        )  # fmt: skip
        made = geometry(
            _tiles.state(), call.layout, call.score, call.v is None, channels, self.out_shape[-1], self.heads,
            self.kv_heads, self.queries, k.element_size(), _run.target_of(k), _run.precision(k.dtype),
            0 if call.cos is None else call.cos.shape[1], backward, tiled,
            option,
        )  # fmt: skip
        self._geometry, self.q_per_kv, self.cell, self.short_cell = made, made.q_per_kv, made.cell, made.short_cell
        self.pack, self.packs, self.heads_per_program = made.pack, made.packs, made.heads_per_program
        self.tiles, self.tiles_of_partials, self.whole_tiles = made.tiles, made.tiles_of_partials, made.whole
        self.variant_inputs, self.variant_options = VariantInputs.of(call), VariantOptions.of(call)
        if drops and self.pack == 1 and call.skip_prefix % 4 == 0:
            self.variant_options = self.variant_options._replace(dropout="fours")
        self.softmax = call.score == "softmax"
        self.fp32_softmax = self.softmax and k.dtype == torch.float32
        self.q_factor = 1.0
        if self.softmax and not self.fp32_softmax:
            self._make_scale_positive()
        q, k, rope, self.rope_options = self._rope()
        if self.q_factor != 1:
            q = q * self.q_factor
        self.q, self.k, self.v = readable(q), readable(k), readable(v)
        self.queries_operand = self.query_operand(self.q)
        keys = KeyOperand(self.k, *self.k.stride()[:2])
        self.kv = KeysAndValues(keys, KeyOperand(self.v, *self.v.stride()[:2]), rope)
        self.sizes = self._sizes()
        self._tile_lists = TileLists()

    def _make_scale_positive(self) -> None:
        """Move the sign of the scale into the queries, exactly, and as a whole a scale that is 0 or far from 1.

        The softmax of 16 bits takes the largest product for the largest score, and multiplies by powers of two.
        """
        scale = self.call.scale
        if _SCALES[0] <= scale <= _SCALES[1]:
            return
        self.q_factor = -1.0 if _SCALES[0] <= -scale <= _SCALES[1] else scale
        self.variant_inputs = self.variant_inputs._replace(scale=abs(scale) if self.q_factor == -1.0 else 1.0)

    def _rope(self) -> tuple[Tensor, Tensor, Rope | None, RopeOptions]:
        """Queries and keys, rotated where a pass before is cheaper, the kernels' operand, and what they do with it.

        Bits are the same either way; so queries are rotated before they are multiplied by a factor that rounds them.
        Where the kernels lack registers, they know nothing of rotary embedding.
        """
        call, q, k = self.call, self.call.q, self.call.k
        if call.cos is None or call.sin is None:
            return q, k, None, _NO_ROPE
        pairs, inside = call.cos.shape[1], self._geometry.rotates
        queries_first, keys_first = rotated_before(call, inside, self.backward)
        queries_first = queries_first or abs(self.q_factor) != 1
        tables, interleaved = (call.cos, call.sin), call.rope_interleaved
        if queries_first:
            q = rotated(q, self.offsets.q, *tables, call.positions_q, interleaved, backwards=False)
        if keys_first:
            k = rotated(k, self.offsets.kv, *tables, call.positions_k, interleaved, backwards=False)
        if not inside:
            return q, k, None, _NO_ROPE
        options = RopeOptions(pairs, interleaved, not queries_first, not keys_first)
        return q, k, rope_operand(*tables, call.positions_q, call.positions_k), options

    # ------------------------------------------------------------ tiles and grids

    def short_tiles(self, backward: bool = False) -> Tiles | None:
        """Tiles of short rows, of `keys` tokens at most; None where there are none."""
        return self._geometry.short[backward]

    def num_partials(self, split_kv: int) -> int:
        """Number of partials of all rows of more than `split_kv` keys (`_attention_output.partial_index`)."""
        return splits.num_partials(self.k_tokens, split_kv)

    @functools.cached_property
    def _sides(self) -> tuple[Side, Side]:
        """Tokens of queries and of keys, for lists of tiles. Only packed queries have offsets of their own."""
        call, k_tokens = self.call, self.k_tokens
        k_facts = facts_of(call.kv_offsets)
        q_facts = k_facts if call.q_offsets is None else facts_of(call.q_offsets)
        keys = Side(self.offsets.kv, k_tokens, self.offsets.q, self.tokens, k_facts, q_facts)
        if call.layout != "packed":
            keys = Side(self.offsets.kv, k_tokens, None, 0, k_facts)
        return Side(self.offsets.q, self.tokens, self.offsets.kv, k_tokens, q_facts, k_facts), keys

    @property
    def _searches(self) -> bool:
        """Whether programs search for their rows, for nothing is known of the batch's rows and they are few."""
        return self.rows < _programs.MANY_ROWS and not any_facts()

    def _tile_programs(self, of_keys: bool, per_token: int, block: int) -> Programs:
        if self._searches:
            tokens = self.k_tokens if of_keys else self.tokens
            return Programs(slots(tokens, self.rows, per_token, block) * self.packs, None, False)
        # In float32 a loop over tiles spills registers.
        loops = self.k.element_size() < 4
        return self._tile_lists.programs(self._sides[of_keys], per_token, block, self.cell, self.packs, loops)

    @functools.cached_property
    def splits(self) -> Splits:
        """Splits of the rows' keys."""
        split_kv = splits.split_kv(self.call)
        if not split_kv:
            return Splits(0)
        if not any_facts():
            return splits_by_marks(self.k_tokens, split_kv)
        return splits_of(self._sides[True], self.sizes[4], split_kv)

    def query_programs(self, block: int, rows: int, of_splits: Splits) -> Programs:
        """Programs of a pass over queries of the batch's rows, or of `rows` groups: one for each tile, or for each
        split of a row's keys and tile."""
        if self.call.layout == "packed":
            return self._tile_programs(False, self.heads_per_program, block)
        tiles_of_row = -(-self.queries * self.heads_per_program // block)
        return Programs((rows + of_splits.later) * tiles_of_row * self.packs, of_splits.split_list, False)

    def key_programs(self, block: int) -> Programs:
        """Programs of the pass over keys."""
        return self._tile_programs(True, self.pack, block)

    def any_short(self) -> bool:
        """Whether the kernels of short rows may have work."""
        return self._searches or self._sides[0].any_short(self.short_cell)

    def any_whole(self, cell: int, most: int) -> bool:
        """Whether the backward of whole rows may have work in rows of more than `cell` and at most `most` tokens."""
        return self._searches or self._sides[0].any_short(most, cell)

    def any_longer(self) -> bool:
        """Whether any query may be left to the kernels of tiles of one row."""
        block = self.tiles("grad_queries").queries
        return self.call.layout != "packed" or self.query_programs(block, self.rows, Splits(0))[0] > 0

    # ------------------------------------------------------------ arguments of kernels

    def know(self, operands: tuple[Any, ...], *options: Hashable) -> None:
        """Find the kernels of calls like this one, whose further operands and options these are."""
        self.known = _run.known_to(
            (self.queries_operand, *self.kv, *self.offsets, self.variant_inputs, *operands),
            self.sizes, self._geometry, self.rope_options, self.variant_options, *options,
        )  # fmt: skip

    def _sizes(self) -> tuple[int, ...]:
        """Rows, tokens, queries of a row, skipped keys, and limits of masks; none larger than the number of tokens."""
        call, tokens, k_tokens = self.call, self.tokens, self.k_tokens
        most = max(tokens, k_tokens)
        left, right = min(call.window_left, most), min(call.window_right, most)
        skip, prefix = min(call.skip_prefix, k_tokens), min(call.num_prefix, most)
        return self.rows, tokens, k_tokens, self.queries, skip, left, right, prefix

    def split_sizes(self) -> tuple[int, ...]:
        """Sizes for the kernels that combine partials."""
        rows, _, k_tokens, queries, skip, *_ = self.sizes
        return rows, k_tokens, queries, skip

    def query_operand(self, x: Tensor) -> QueryOperand:
        """A tensor of the queries' or the output's layout."""
        *row, token, head, _ = x.stride()
        return QueryOperand(x, row[0] if row else 0, token, head)

    def gate_operand(self, gate: Tensor) -> GateOperand:
        """A gate that was expanded to the output's shape."""
        return GateOperand(*self.query_operand(gate), gate.stride(-1))

    def gate_options(self) -> GateOptions:
        return GateOptions(self.call.gate_form, self.call.gate_activation)

    def shape(self, chosen: Tiles) -> Shape:
        """Shape of the kernels of tiles of one row."""
        return self._geometry.shape(chosen, self.rope_options)

    def shape_of_one_head(self, chosen: Tiles) -> Shape:
        """Shape of a kernel of tiles of one row under one query head."""
        return self.shape(chosen)._replace(pack=1, packs=self.kv_heads)

    def short_shape(self, chosen: Tiles) -> ShortShape:
        """Shape of the kernels of short rows."""
        return self._geometry.short_shape(chosen, self.rope_options)

    def whole_shape(self, cell: int, chosen: Tiles) -> ShortShape:
        """Shape of the backward of whole rows of more than `cell` tokens."""
        return self._geometry.whole_shape(cell, chosen, self.rope_options)
