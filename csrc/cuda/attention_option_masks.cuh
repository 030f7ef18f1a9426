// Masks of attention beyond causality, window and a full prefix: targets, a full tail, and prefixes of other kinds. A
// query sees at most three intervals of keys: the prefix, one of its own, and, if it is a target, itself.
//
// Along the queries of a row these intervals move on, except at a few tokens, the turns: at the end of the prefix, at
// the begin of the full tail, and at the first target. So what some or all queries of a tile see follows from the
// first, the last, and the two at each turn between them.
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/attention_masks.cuh"
#include "cuda/rows.cuh"

namespace interformer {
namespace cuda {

// Tokens of a row of the batch. The last `targets` of its queries and of its keys are targets; other keys are its
// history.
struct RowSizes {
    int queries, keys, targets;

    __device__ int history() const { return keys - targets; }
    __device__ int ordinary() const { return queries - targets; }  // queries before the targets
    __device__ int shift() const { return keys - queries; }        // from a query to its own key
    // The place of a query among the keys.
    __device__ int place(int n) const { return n < ordinary() ? n + shift() : history(); }
};

// Keys that a query sees: [from, to), those before `prefix`, and `own` (-1: none).
struct KeySet : KeyRange {
    int own;

    __device__ bool contains(int key) const { return KeyRange::contains(key) | (key == own); }
    __device__ bool contains(int first, int count) const { return KeyRange::contains(first, count); }
    __device__ bool fully_masked() const { return KeyRange::fully_masked() && own < 0; }
};

// Tiles [0, before), [start, stop) and [own_start, own_stop).
struct TileSet : TileRange {
    int own_start = 0, own_stop = 0;

    __device__ TileSet() : TileRange{} {}
    // From these intervals, each without the tiles of those before it.
    __device__ TileSet(int64_t before, int64_t start, int64_t stop, int64_t own_start, int64_t own_stop)
        : TileRange{static_cast<int>(before), static_cast<int>(max(start, before)), 0} {
        this->stop = static_cast<int>(max(stop, int64_t{this->start}));
        this->own_start = static_cast<int>(max(own_start, int64_t{this->stop}));
        this->own_stop = static_cast<int>(max(own_stop, int64_t{this->own_start}));
    }
    __device__ int count() const { return TileRange::count() + own_stop - own_start; }
    __device__ int operator[](int step) const {
        const int seen = TileRange::count();
        return step < seen ? TileRange::operator[](step) : own_start + step - seen;
    }
    __device__ bool contains(int tile) const {
        return TileRange::contains(tile) | ((tile >= own_start) & (tile < own_stop));
    }
    __device__ TileSet within(int from, int to) const {
        const TileRange range = TileRange::within(from, to);
        return {range.before, range.start, range.stop, own_start, own_stop};
    }
};

// The masks of a call with options.
struct OptionMasks : Masks {
    Prefix kind;
    int full_tail;
    Indices num_targets;  // without entries: there are none

    OptionMasks(const AttentionVariant& variant, const VariantTensors& tensors)
        : Masks(variant), kind(variant.prefix), full_tail(clamped(variant.full_tail)) {
        if (tensors.num_targets) num_targets = Indices(*tensors.num_targets);
    }

    // Row `row` of so many queries and keys; `in_row` is false for the tail, which has no targets.
    __device__ RowSizes sizes(int64_t row, int queries, int keys, bool in_row) const {
        int64_t targets = 0;
        if (num_targets.entries != nullptr && in_row)
            targets = min(max(num_targets[row], int64_t{0}), int64_t{min(queries, keys)});
        return {queries, keys, static_cast<int>(targets)};
    }
};

// The masks of one row, where calls have none of these options.
struct RowMasks {
    const Masks& masks;
    int queries, keys;

    __device__ KeyRange key_range(int n) const { return masks.key_range(n, queries, keys); }
    __device__ KeyRange common_range(int first, int last) const {
        return masks.common_range(first, last, queries, keys);
    }
    __device__ TileRange key_tiles(int first, int last, int tile) const {
        return masks.key_tiles(first, last, queries, keys, tile);
    }
    __device__ TileRange query_tiles(int first, int last, int q_per_kv, int tile) const {
        return masks.query_tiles(first, last, queries, keys, q_per_kv, tile);
    }
};

// The same with options.
struct OptionRowMasks {
    const OptionMasks& masks;
    RowSizes sizes;
    int64_t first_query, first_key;  // numbers of the row's first tokens among those of the batch

    // Keys that query token `n` of the row sees. Tokens behind the row's queries see none.
    __device__ KeySet key_range(int n) const {
        if (n >= sizes.queries) return {{0, 0, 0}, -1};
        const int history = sizes.history(), place = sizes.place(n);
        const bool is_target = n >= sizes.ordinary();
        KeySet set{{0, history, masks.kind == Prefix::index ? 0 : min(masks.prefix, history)},
                   is_target ? n + sizes.shift() : -1};
        if (!is_target && n < prefix_queries()) return set;
        if (masks.causal) set.to = min(set.to, place + 1);
        if (masks.full_tail == 0 || n < sizes.ordinary() - masks.full_tail) {
            if (masks.right >= 0 && place + 1 <= history - masks.right) set.to = min(set.to, place + 1 + masks.right);
            if (masks.left >= 0 && place > masks.left) set.from = place - masks.left;
        }
        if (masks.kind == Prefix::keys && masks.causal) set.prefix = min(set.prefix, max(place + 1, 0));
        // A window that reaches the last key of the prefix reaches the place that all of it shares.
        if (masks.kind == Prefix::index && set.from < masks.prefix) set.from = 0;
        return set;
    }

    // Keys that all of the query tokens [first, last] see by their intervals, those behind the row's queries left
    // aside.
    __device__ KeySet common_range(int first, int last) const {
        KeySet common{{0, INT_MAX, INT_MAX}, -1};
        for_each_turn(first, last, [&](const KeySet& set) {
            common.from = max(common.from, set.from);
            common.to = min(common.to, set.to);
            common.prefix = min(common.prefix, set.prefix);
        });
        return common;
    }

    // Tiles of `tile` keys that some of the query tokens [first, last] see.
    __device__ TileSet key_tiles(int first, int last, int tile) const {
        int from = INT_MAX, to = 0, prefix = 0, own = INT_MAX, own_end = 0;
        for_each_turn(first, last, [&](const KeySet& set) {
            prefix = max(prefix, set.prefix);
            if (set.from < set.to) from = min(from, set.from), to = max(to, set.to);
            if (set.own >= 0) own = min(own, set.own), own_end = max(own_end, set.own + 1);
        });
        const auto end_of = [&](int key) { return (int64_t{key} + tile - 1) / tile; };
        return {end_of(prefix), to > 0 ? from / tile : 0, end_of(to), own_end > 0 ? own / tile : 0, end_of(own_end)};
    }

    // Tiles of `tile` packed rows of queries that see some of the keys [first, last].
    __device__ TileSet query_tiles(int first, int last, int q_per_kv, int tile) const {
        const int64_t ordinary = sizes.ordinary(), queries = sizes.queries, shift = sizes.shift();
        int64_t before = 0, begin = 0, end = 0, own_begin = queries, own_end = queries;
        if (first < sizes.history()) {
            before = min(max(prefix_queries(), int64_t{0}), ordinary);
            const int64_t causal = masks.causal ? first - shift : 0;
            begin = causal, end = ordinary;
            window(begin, end, first - shift, min(last, sizes.history() - 1) - shift);
            if (first < masks.prefix) {
                if (masks.kind != Prefix::keys || !masks.causal) begin = 0;
                if (masks.kind != Prefix::index)
                    end = ordinary;
                else if (masks.left >= 0)
                    end = min(max(end, masks.prefix - shift + masks.left), ordinary);
            }
            if (masks.full_tail > 0)
                own_begin = max(ordinary - masks.full_tail, min(causal, ordinary));
            else if (masks.left < 0 || last >= sizes.history() - masks.left || first < masks.prefix)
                own_begin = ordinary;
        }
        if (last >= sizes.history())  // targets that are among the keys
            own_begin = min(own_begin, max(first - shift, ordinary));
        if (first >= sizes.history()) own_end = min(last - shift + 1, queries);
        const auto start_of = [&](int64_t n) { return max(n, int64_t{0}) * q_per_kv / tile; };
        const auto end_of = [&](int64_t n) { return (max(n, int64_t{0}) * q_per_kv + tile - 1) / tile; };
        return {end_of(before), start_of(begin), end > begin ? end_of(end) : 0, start_of(own_begin),
                own_end > own_begin ? end_of(own_end) : 0};
    }

  private:
    // Queries that see all of the history, since they are of the prefix; negative where none is.
    __device__ int64_t prefix_queries() const {
        if (masks.kind == Prefix::keys) return 0;
        return masks.kind == Prefix::full ? int64_t{masks.prefix} : int64_t{masks.prefix} - sizes.shift();
    }

    // Narrows queries [begin, end) to those whose window holds some of the places [first, last].
    __device__ void window(int64_t& begin, int64_t& end, int64_t first, int64_t last) const {
        if (masks.right >= 0) begin = max(begin, first - masks.right);
        if (masks.left >= 0) end = min(end, last + masks.left + 1);
    }

    // Calls `use` with the keys of the query tokens first and last of [first, last] and at each turn between them.
    template <typename Use>
    __device__ void for_each_turn(int first, int last, Use&& use) const {
        last = min(last, sizes.queries - 1);
        if (first > last) return;
        const int64_t prefix = prefix_queries(), targets = sizes.ordinary(), tail = targets - masks.full_tail;
#pragma unroll 1
        for (int i = 0; i < 8; ++i) {
            const int64_t turn = i < 2 ? prefix : i < 4 ? tail : targets;
            const int64_t token = i < 6 ? turn - i % 2 : i < 7 ? first : last;
            if (i >= 6 || (turn > first && turn <= last)) use(key_range(static_cast<int>(token)));
        }
    }
};

}  // namespace cuda
}  // namespace interformer
