// Options of the attention variant that few calls have: masks of other kinds, softcap, biases and dropout. A call with
// any of them runs kernels of its own, so that plain ones pay nothing for them, neither instructions nor registers.
// (Sinks are no part of this: no loop over keys sees them.)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/attention_call.h"
#include "cuda/attention_option_masks.cuh"
#include "cuda/maps.cuh"
#include "cuda/philox.cuh"

namespace interformer {
namespace cuda {

// A score: a query token of the row under its head, and the number of the key.
struct ScorePlace {
    int token, head, key;
};

// A table of numbers by head, or for all heads.
struct BiasTable {
    const float* data = nullptr;  // null: none
    int entries = 0, row = 0;     // `row`: from head to head; 0 for all heads

    BiasTable() = default;
    explicit BiasTable(const std::optional<TensorView>& table) {
        if (!table) return;
        data = static_cast<const float*>(table->data);
        entries = static_cast<int>(table->shape[1]);
        row = table->shape[0] > 1 ? entries : 0;
    }
    __device__ float at(int head, int entry) const { return data[int64_t{head} * row + entry]; }
};

// Numbers added to scores, by the distance of query and key and by their difference of time.
struct Biases {
    BiasTable by_distance, by_time;
    bool queries_at_end;
    const int64_t *times_q = nullptr, *times_k = nullptr, *edges = nullptr;

    Biases(const AttentionVariant& variant, const VariantTensors& tensors)
        : by_distance(tensors.position_bias), by_time(tensors.time_bias), queries_at_end(variant.queries_at_end) {
        if (!tensors.time_bias) return;
        times_q = static_cast<const int64_t*>(tensors.times_q->data);
        times_k = static_cast<const int64_t*>(tensors.times_k->data);
        edges = static_cast<const int64_t*>(tensors.time_edges->data);
    }
    __host__ __device__ bool any() const { return by_distance.data != nullptr || by_time.data != nullptr; }

    // Entries of the tables for a query token and a key of the row.
    __device__ int distance_entry(const OptionRowMasks& row, int token, int key) const {
        const int most = by_distance.entries / 2, place = queries_at_end ? row.sizes.keys : row.sizes.place(token);
        return min(max(place - key, -most), most) + most;
    }
    // The number of edges up to the difference of times, which ascend; some number of them where they do not.
    __device__ int time_entry(const OptionRowMasks& row, int token, int key) const {
        const int64_t a = times_q[row.first_query + token], b = times_k[row.first_key + key];
        const uint64_t apart = a < b ? uint64_t(b) - uint64_t(a) : uint64_t(a) - uint64_t(b);
        int low = 0, high = by_time.entries - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (edges[middle] < 0 || uint64_t(edges[middle]) <= apart)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
    // The sum at a place. Places of a tile that the row does not have are masked: there it is any number.
    __device__ float at(const OptionRowMasks& row, const ScorePlace& place) const {
        const int token = min(place.token, row.sizes.queries - 1), key = min(place.key, row.sizes.keys - 1);
        float sum = 0.0f;
        if (by_distance.data != nullptr) sum += by_distance.at(place.head, distance_entry(row, token, key));
        if (by_time.data != nullptr) sum += by_time.at(place.head, time_entry(row, token, key));
        return sum;
    }
};

// Dropout of weights: those that are kept are multiplied by `factor`, once for sums of them.
struct Dropout {
    bool any;
    const int64_t* seed = nullptr;  // null: all weights are dropped
    uint32_t least = 0;             // random word of a weight that is kept
    int skipped;                    // keys of each row before the first one
    double factor = 1;
    float inverse;

    explicit Dropout(const AttentionInputs& in)
        : any(in.variant.dropout_p > 0), skipped(clamped(in.skip_prefix)), inverse(1) {
        if (!in.variant.drops()) return;
        seed = static_cast<const int64_t*>(in.variant_tensors.dropout_seed->data);
        least = static_cast<uint32_t>(in.variant.dropout_p * 4294967296.0);
        factor = 1.0 / (1.0 - in.variant.dropout_p);
        inverse = static_cast<float>(1.0 - in.variant.dropout_p);
    }

    // Which of two weights are kept: of neighbouring keys, or of neighbouring queries.
    __device__ void keeps(bool (&kept)[2], const OptionRowMasks& row, const ScorePlace (&places)[2]) const {
        kept[0] = kept[1] = !any;
        if (!any || seed == nullptr) return;
        const RandomWords first = words(row, places[0]);
        kept[0] = first[word(places[0])] >= least;
        const bool shared = (places[0].token == places[1].token) & (places[0].head == places[1].head) &
                            (number(places[0]) / 4 == number(places[1]) / 4);
        kept[1] = (shared ? first : words(row, places[1]))[word(places[1])] >= least;
    }

  private:
    __device__ uint32_t number(const ScorePlace& place) const {
        return static_cast<uint32_t>(place.key) + static_cast<uint32_t>(skipped);
    }
    __device__ uint32_t word(const ScorePlace& place) const { return number(place) % 4; }
    __device__ RandomWords words(const OptionRowMasks& row, const ScorePlace& place) const {
        return philox(number(place) / 4, static_cast<uint32_t>(place.head),
                      static_cast<uint64_t>(row.first_query + place.token), static_cast<uint64_t>(*seed));
    }
};

struct Options {
    OptionMasks masks;
    float softcap = 0.0f;  // 0: none
    Biases biases;
    Dropout dropout;
    bool any;

    explicit Options(const AttentionInputs& in)
        : masks(in.variant, in.variant_tensors), biases(in.variant, in.variant_tensors), dropout(in) {
        using Limits = std::numeric_limits<float>;
        if (in.variant.softcap > 0)
            softcap = static_cast<float>(std::clamp<double>(in.variant.softcap, Limits::min(), Limits::max()));
        const bool masked = masks.kind != Prefix::full || masks.full_tail > 0 || in.variant_tensors.num_targets;
        any = masked || in_memory();
    }
    // Whether scores are mapped before the softmax or the pointwise score.
    __host__ __device__ bool maps_scores() const { return softcap > 0.0f || biases.any(); }
    // Whether scores or weights are mapped one by one, in shared memory.
    __host__ __device__ bool in_memory() const { return maps_scores() || dropout.any; }

    // A score of a scaled product, and the derivative of the one by the other. Rounded step by step, so that every pass
    // has the same scores.
    __device__ float score(float s, const OptionRowMasks& row, const ScorePlace& place) const {
        if (softcap > 0.0f) s = __fmul_rn(softcap, tanhf(s / softcap));
        return biases.any() ? s + biases.at(row, place) : s;
    }
    __device__ float score_grad(float s) const {
        return softcap > 0.0f ? activation_grad(s / softcap, Activation::tanh) : 1.0f;
    }
};

// Keys that a query sees, of calls with options or without.
template <bool OPTIONS>
using KeysOf = std::conditional_t<OPTIONS, KeySet, KeyRange>;

// ---------------------------------------------------------------- places of scores

// The places of a tile's scores together with their row: `rows` are its packed rows of queries.
template <typename OneQuery>
struct OptionScoresByQuery : ScoresByQuery<OneQuery> {
    const PackedRows& rows;
    const OptionRowMasks& row;

    // Halves may be known at run time alone.
    __device__ OneQuery query(int half, int) const { return half == 0 ? this->queries[0] : this->queries[1]; }
    __device__ ScorePlace place(int half, int column) const {
        const PackedRow query = rows[lane_index() / 4 + half * 8];
        return {query.token, query.head, this->key(half, column)};
    }
};

template <int COUNT>
struct OptionScoresByKey : ScoresByKey<COUNT, KeySet> {
    const PackedRows& rows;
    const OptionRowMasks& row;

    __device__ ScorePlace place(int half, int column) const {
        const PackedRow query = rows[this->first + column];
        return {query.token, query.head, half == 0 ? this->keys[0] : this->keys[1]};
    }
};

// Places with their row where the call has options, and as they are where it has none.
template <typename Scores>
__device__ inline const Scores& places_of(const Scores& scores, const PackedRows&, const RowMasks&) {
    return scores;
}
template <typename OneQuery>
__device__ inline OptionScoresByQuery<OneQuery> places_of(const ScoresByQuery<OneQuery>& scores, const PackedRows& rows,
                                                          const OptionRowMasks& row) {
    return {scores, rows, row};
}
template <int COUNT>
__device__ inline OptionScoresByKey<COUNT> places_of(const ScoresByKey<COUNT, KeySet>& scores, const PackedRows& rows,
                                                     const OptionRowMasks& row) {
    return {scores, rows, row};
}

}  // namespace cuda
}  // namespace interformer
