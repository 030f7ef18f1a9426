// Look-ups of additive bias: the bins of differences of times, and a table's values by bin.
#pragma once

#include "cpu/attention_problem.h"
#include "cpu/kernels/isa.h"

INTERFORMER_ISA_BEGIN

// The bins of |x - t| between edges in ascending order: how many of them are at most as large.
class TimeBins {
  public:
    static constexpr int64_t L = kLanes<int64_t>;
    using Times = Vector<int64_t>;

    TimeBins(const int64_t* edges, int64_t count) : edges_(edges), count_(count) {
        while (2 * step_ <= count) step_ *= 2;
    }

    // A vector of times `x` against `times`: rows of bins, `stride` apart. Times next to each other mostly are so in
    // value, too: a bin is searched only where one lane has left its own.
    void find(Times x, const int64_t* times, int64_t count, int32_t* to, int64_t stride) const {
        constexpr int64_t kMost = INT64_MAX;
        Times bins{}, least = Times{} + kMost, end = Times{} - kMost;
        for (int64_t i = 0; i < count; ++i, to += stride) {
            const Times ahead = (Times)((Vector<uint64_t>)x - static_cast<uint64_t>(times[i])), sign = ahead >> 63;
            const Times apart = (Times)((Vector<uint64_t>)(ahead ^ sign) - (Vector<uint64_t>)sign);
            if (any_word((apart < least) | (apart >= end))) {
                bins = search(apart);
                for (int64_t lane = 0; lane < L; ++lane) {
                    least[lane] = bins[lane] == 0 ? -kMost : edges_[bins[lane] - 1];
                    end[lane] = bins[lane] == count_ ? kMost : edges_[bins[lane]];
                }
            }
            typedef int32_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
            const Narrow narrow = __builtin_convertvector(bins, Narrow);
            std::memcpy(to, &narrow, sizeof narrow);
        }
    }

  private:
    static INTERFORMER_INLINE bool any_word(Times lanes) {
#ifdef __AVX512F__
        return _mm512_test_epi64_mask((__m512i)lanes, (__m512i)lanes) != 0;
#else
        return any<double>(lanes);
#endif
    }

    Times search(Times apart) const {
        Times bins{};
        if (count_ == 0) return bins;
        for (int64_t step = step_; step > 0; step /= 2) {
            const Times next = bins + step, inside = next > count_ ? Times{} + count_ : next;
            const Times edges = edges_at(inside - 1);
            bins = (next <= count_) & (edges <= apart) ? next : bins;
        }
        return bins;
    }
    Times edges_at(Times places) const {
#ifdef __AVX512F__
        return (Times)_mm512_mask_i64gather_epi64((__m512i)places, 0xff, (__m512i)places, edges_, 8);
#else
        Times edges;
        for (int64_t lane = 0; lane < L; ++lane) edges[lane] = edges_[places[lane]];
        return edges;
#endif
    }

    const int64_t* edges_;
    int64_t count_, step_ = 1;
};

// Numbers at a vector of places.
template <typename A>
INTERFORMER_INLINE Vector<A> gathered(const A* from, Vector<typename IndexOf<A>::type> places) {
#ifdef __AVX512F__
    if constexpr (sizeof(A) == 4) return _mm512_mask_i32gather_ps(Vector<float>{}, 0xffff, (__m512i)places, from, 4);
    if constexpr (sizeof(A) == 8) return _mm512_mask_i64gather_pd(Vector<double>{}, 0xff, (__m512i)places, from, 8);
#endif
    Vector<A> x;
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < kLanes<A>; ++lane) x[lane] = from[places[lane]];
    return x;
}

template <typename A>
INTERFORMER_INLINE Vector<typename IndexOf<A>::type> load_bins(const int32_t* bins) {
    using Index = typename IndexOf<A>::type;
    if constexpr (sizeof(A) == 4) {
        return load_vector(bins);
    } else {
        Vector<Index> places;
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) places[lane] = bins[lane];
        return places;
    }
}

// A table of numbers, and their sums with scores.
template <typename A>
class TableValues {
  public:
    TableValues(const A* table, int64_t entries) : table_(table), entries_(entries) {
#ifdef __AVX512F__
        if constexpr (sizeof(A) == 4)
            if (entries <= kPermuted) {
                for (int64_t i = 0; i < round_up(entries, 32); ++i) copy_[i] = i < entries ? table[i] : 0;
                pairs_ = entries <= 32 ? 1 : entries <= 64 ? 2 : 4;
            }
#endif
    }

    // Adds the table's number of each bin to `count` scores, whole vectors.
    void add(const int32_t* bins, int64_t count, A* scores) const {
        if (pairs_ == 1) return add_each(bins, count, scores, [&](auto at) { return permuted<1>(at); });
        if (pairs_ == 2) return add_each(bins, count, scores, [&](auto at) { return permuted<2>(at); });
        if (pairs_ == 4) return add_each(bins, count, scores, [&](auto at) { return permuted<4>(at); });
        add_each(bins, count, scores, [&](auto at) { return gathered<A>(table_, at); });
    }

  private:
    static constexpr int64_t kPermuted = 128;  // entries that permutations reach, faster than gathers
    using Places = Vector<typename IndexOf<A>::type>;

    template <typename ValuesAt>
    static INTERFORMER_INLINE void add_each(const int32_t* bins, int64_t count, A* scores, ValuesAt&& values_at) {
        for (int64_t i = 0; i < count; i += kLanes<A>)
            store_vector(scores + i, load_vector(scores + i) + values_at(load_bins<A>(bins + i)));
    }

    // Among so many pairs of vectors.
    template <int Pairs>
    INTERFORMER_INLINE Vector<A> permuted(Places at) const {
#ifdef __AVX512F__
        if constexpr (sizeof(A) == 4) {
            Vector<float> x[Pairs];
#pragma GCC unroll 4
            for (int i = 0; i < Pairs; ++i)
                x[i] = _mm512_maskz_permutex2var_ps(0xffff, load_vector(copy_ + 32 * i), (__m512i)at,
                                                    load_vector(copy_ + 32 * i + 16));
            if constexpr (Pairs >= 2) x[0] = (at & 32) != 0 ? x[1] : x[0];
            if constexpr (Pairs == 4) x[0] = (at & 64) != 0 ? ((at & 32) != 0 ? x[3] : x[2]) : x[0];
            return x[0];
        }
#endif
        return gathered<A>(table_, at);
    }

    const A* table_;
    int64_t entries_;
    int pairs_ = 0;  // 0: gathers
    A copy_[kPermuted];
};

INTERFORMER_ISA_END
