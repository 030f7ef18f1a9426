// Look-ups of additive bias: the bins of differences of times, and a table's values by bin.
#pragma once

#include <type_traits>

#include "cpu/attention_problem.h"
#include "cpu/kernels/isa.h"

INTERFORMER_ISA_BEGIN

// Numbers at a vector of places.
template <typename A>
INTERFORMER_INLINE Vector<A> gathered(const A* from, Vector<typename IndexOf<A>::type> places) {
#ifdef __AVX512F__
    if constexpr (std::is_same_v<A, float>)
        return _mm512_mask_i32gather_ps(Vector<float>{}, 0xffff, (__m512i)places, from, 4);
    else if constexpr (std::is_same_v<A, double>)
        return _mm512_mask_i64gather_pd(Vector<double>{}, 0xff, (__m512i)places, from, 8);
    else
        return (Vector<A>)_mm512_mask_i64gather_epi64((__m512i)places, 0xff, (__m512i)places, from, 8);
#else
    Vector<A> x{};
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < kLanes<A>; ++lane) x[lane] = from[places[lane]];
    return x;
#endif
}

// The bins of |x - t| between edges in ascending order: how many of them are at most as large.
class TimeBins {
  public:
    static constexpr int64_t L = kLanes<int64_t>;
    using Times = Vector<int64_t>;

    TimeBins(const TimeEdges& edges, int64_t bins)
        : edges_(edges.edges),
          first_bins_(edges.first_bins),
          last_bin_(bins - 1),
          shift_(52 - edges.bits),
          first_cell_((int64_t{1023} << edges.bits) - 1),
          steps_(edges.steps),
          halves_(edges.halves) {}

    // V vectors of times `x` against `times`: rows of bins, `stride` apart.
    template <int V>
    void find(const Times (&x)[V], const int64_t* times, int64_t count, int32_t* to, int64_t stride) const {
#ifdef __AVX512F__
        if constexpr (V == 2)
            if (halves_ != nullptr) return find_by_halves(x, times, count, to, stride);
#endif
        typedef int32_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
        for (int64_t i = 0; i < count; ++i, to += stride)
            for (int v = 0; v < V; ++v) {
                const Narrow bins = __builtin_convertvector(bins_of(apart(x[v], times[i])), Narrow);
                std::memcpy(to + v * L, &bins, sizeof bins);
            }
    }

  private:
    static INTERFORMER_INLINE Times apart(Times x, int64_t time) {
        const Times ahead = (Times)((Vector<uint64_t>)x - static_cast<uint64_t>(time)), sign = ahead >> 63;
        return (Times)((Vector<uint64_t>)(ahead ^ sign) - (Vector<uint64_t>)sign);
    }

#ifdef __AVX512F__
    // All edges are less than the most that 32 bits hold, so what is further apart may be taken for the number before
    // it.
    void find_by_halves(const Times (&x)[2], const int64_t* times, int64_t count, int32_t* to, int64_t stride) const {
        using Numbers = Vector<int32_t>;
        constexpr int64_t kHalves = TimeEdges::kHalves, kHalvings = TimeEdges::kHalvings;
        const __m512i most = _mm512_set1_epi32(INT32_MAX - 1);
        Numbers halves[kHalvings], second = load_vector(halves_ + (kHalvings - 1) * kHalves + kLanes<int32_t>);
#pragma GCC unroll 8
        for (int64_t step = 0; step < kHalvings; ++step) halves[step] = load_vector(halves_ + step * kHalves);
        for (int64_t i = 0; i < count; ++i, to += stride) {
            const __m256i low = _mm512_maskz_cvtsepi64_epi32(0xff, (__m512i)apart(x[0], times[i]));
            const __m256i high = _mm512_maskz_cvtsepi64_epi32(0xff, (__m512i)apart(x[1], times[i]));
            const __m512i first = _mm512_maskz_inserti64x4(0xff, _mm512_setzero_si512(), low, 0);
            const __m512i numbers = _mm512_maskz_inserti64x4(0xff, first, high, 1);
            const Numbers between = (Numbers)_mm512_maskz_min_epi32(0xffff, numbers, most);
            Numbers bins{};
#pragma GCC unroll 8
            for (int64_t step = 0; step < kHalvings; ++step) {
                const __m512i part = (__m512i)(bins >> (kHalvings - step));
                const Numbers edge = step + 1 < kHalvings
                                         ? (Numbers)_mm512_maskz_permutexvar_epi32(0xffff, part, (__m512i)halves[step])
                                         : (Numbers)_mm512_maskz_permutex2var_epi32(0xffff, (__m512i)halves[step], part,
                                                                                    (__m512i)second);
                bins += (edge <= between) & static_cast<int32_t>(kHalves >> step);
            }
            store_vector(to, bins);
        }
    }
#endif

    INTERFORMER_INLINE Times bins_of(Times apart) const {
        // A double holds the first bits of a number exactly, which is all that cells ask.
        const Times first_bits = apart >> 53 != 0 ? apart & ~int64_t{2047} : apart;
        const Vector<double> number = __builtin_convertvector(first_bits, Vector<double>);
        Times word;
        std::memcpy(&word, &number, sizeof word);
        const Times cell = (word >> shift_) - first_cell_, inside = cell < 0 ? Times{} : cell;
        Times bins = first_bins(inside) & ~(apart >> 63);  // a distance of 2^63 is the least number of 64 bits
        for (int64_t step = 0; step < steps_; ++step)
            bins -= (gathered<int64_t>(edges_, bins) <= apart) & (bins < last_bin_);
        return bins;
    }
    INTERFORMER_INLINE Times first_bins(Times cells) const {
#ifdef __AVX512F__
        const __m256i bins =
            _mm512_mask_i64gather_epi32(_mm256_setzero_si256(), 0xff, (__m512i)cells, first_bins_, sizeof(int32_t));
        return (Times)_mm512_maskz_cvtepi32_epi64(0xff, bins);
#else
        Times bins{};
        for (int64_t lane = 0; lane < L; ++lane) bins[lane] = first_bins_[cells[lane]];
        return bins;
#endif
    }

    const int64_t* edges_;
    const int32_t* first_bins_;
    const int64_t last_bin_, shift_, first_cell_, steps_;
    const int32_t* halves_;
};

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
                std::memcpy(copy_, table, static_cast<size_t>(entries) * sizeof(A));
                fill(copy_ + entries, round_up(entries, 32) - entries, A(0));
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
