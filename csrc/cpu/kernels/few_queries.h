// Products of tokens with few queries under all heads, for memory-bound rows: all heads of a token are read in one
// step, one token after another, in the order of memory. Reading one head after another reaches a third of that speed.
//
// A unit is one query under one key/value head: unit `query * heads + head`. Numbers of units, one for each token, lie
// in groups of `kGroup` units, [groups, tokens, kGroup]: a vector has the numbers of some tokens, and a unit's numbers
// lie in the same lane of each of its 128-bit parts.
#pragma once

#include "cpu/kernels/elements.h"

INTERFORMER_ISA_BEGIN

constexpr int64_t kFewUnits = 32;    // units of a row that are computed together
constexpr int64_t kTokenBlock = 48;  // tokens whose scores are computed before their values are read

template <typename A>
constexpr int64_t kGroup = 16 / sizeof(A);
template <typename A>
constexpr int64_t kVectorTokens = kLanes<A> / kGroup<A>;

struct Units {
    int64_t heads, queries;

    int64_t count() const { return heads * queries; }
    template <typename A>
    int64_t groups() const {
        return (count() + kGroup<A> - 1) / kGroup<A>;
    }
};

// The channels of a head: whole vectors, and the numbers behind them.
template <typename A>
struct Channels {
    int64_t vectors, tail;

    explicit Channels(int64_t count) : vectors(count / kLanes<A>), tail(count % kLanes<A>) {}
    int64_t padded() const { return (vectors + (tail > 0)) * kLanes<A>; }
};

// Tokens of some heads in memory, `token` and `head` numbers apart.
template <typename E>
struct HeadTokens {
    E* data;
    int64_t token, head;

    HeadTokens from(int64_t t) const { return {data + t * token, token, head}; }
};
template <typename E>
inline HeadTokens<const E> read_only(HeadTokens<E> x) {
    return {x.data, x.token, x.head};
}

// Numbers of units, as above: groups are `stride` numbers apart.
template <typename A>
struct UnitNumbers {
    A* data;
    int64_t stride;

    A* of_unit(int64_t unit) const { return data + unit / kGroup<A> * stride + unit % kGroup<A>; }
    UnitNumbers from(int64_t token) const { return {data + token * kGroup<A>, stride}; }
};

template <typename E>
inline TokensAhead tokens_ahead(const HeadTokens<E>& x, int64_t heads, int64_t channels) {
    if (x.head != channels) return {};
    constexpr int64_t kSize = sizeof(E);
    return {reinterpret_cast<const char*>(x.data), x.token * kSize, heads * channels * kSize};
}

// Reduces the numbers of each unit in a vector; every 128-bit part of the result has them.
template <typename A, int64_t Half = kLanes<A> / 2, typename Op>
INTERFORMER_INLINE Vector<A> reduce_tokens(Vector<A> x, Op&& op) {
    if constexpr (Half < kGroup<A>) {
        return x;
    } else {
        Vector<typename IndexOf<A>::type> other;
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes<A>; ++lane) other[lane] = lane ^ Half;
        return reduce_tokens<A, Half / 2>(op(x, __builtin_shuffle(x, other)), op);
    }
}

// ---------------------------------------------------------------- weighted sums of tokens

// sums[unit] = sum over t of weights[unit][t] * tokens[t] under the unit's head; rows of sums are padded to whole
// vectors. With `add`, the new sums are added to the old ones, times the units' factors where given.
template <typename E>
class WeightedTokens {
  public:
    using A = Acc<E>;

    WeightedTokens(const Units& units, const Channels<A>& channels) : units_(units), channels_(channels) {}

    void operator()(UnitNumbers<const A> weights, const HeadTokens<const E>& tokens, int64_t count, A* sums, bool add,
                    const A* factors = nullptr) const {
        const Call call{weights, tokens, count, sums, add, factors};
        if (units_.heads % kGroup<A> == 0)
            all_heads<kGroup<A>>(call);
        else if (units_.heads % 2 == 0)
            all_heads<2>(call);
        else
            all_heads<1>(call);
    }

  private:
    static constexpr int64_t G = kGroup<A>, W = kLanes<A>;
    static constexpr int kMaxSums = kTileRows > 8 ? 16 : 8;  // that registers hold beside the operands

    struct Call {
        UnitNumbers<const A> weights;
        const HeadTokens<const E>& tokens;
        int64_t count;
        A* sums;
        bool add;
        const A* factors;
    };

    // `Heads` heads at once, which divide a group.
    template <int Heads>
    void all_heads(const Call& call) const {
        for (int64_t head = 0; head < units_.heads; head += Heads) {
            int64_t c = 0;
            if constexpr (4 * Heads <= kMaxSums)
                for (; c + 4 <= channels_.vectors; c += 4) all_queries<Heads, 4, false>(call, head, c);
            if constexpr (2 * Heads <= kMaxSums)
                for (; c + 2 <= channels_.vectors; c += 2) all_queries<Heads, 2, false>(call, head, c);
            for (; c < channels_.vectors; ++c) all_queries<Heads, 1, false>(call, head, c);
            if (channels_.tail > 0) all_queries<Heads, 1, true>(call, head, c);
        }
    }

    template <int Heads, int C, bool Tail>
    void all_queries(const Call& call, int64_t head, int64_t c) const {
        int64_t query = 0;
        if constexpr (4 * Heads * C <= kMaxSums)
            for (; query + 4 <= units_.queries; query += 4) tile<Heads, C, 4, Tail>(call, head, c, query);
        if constexpr (2 * Heads * C <= kMaxSums)
            for (; query + 2 <= units_.queries; query += 2) tile<Heads, C, 2, Tail>(call, head, c, query);
        for (; query < units_.queries; ++query) tile<Heads, C, 1, Tail>(call, head, c, query);
    }

    template <int Heads, int C, int Queries, bool Tail>
    void tile(const Call& call, int64_t head, int64_t c, int64_t query) const {
        Vector<A> sums[Queries][Heads][C];
        const A* weights[Queries];
#pragma GCC unroll 4
        for (int q = 0; q < Queries; ++q) {
            weights[q] = call.weights.of_unit((query + q) * units_.heads + head);
#pragma GCC unroll 4
            for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
                for (int i = 0; i < C; ++i) sums[q][h][i] = Vector<A>{};
        }
        const E* token = call.tokens.data + head * call.tokens.head + c * W;
        for (int64_t t = 0; t < call.count; ++t, token += call.tokens.token)
#pragma GCC unroll 4
            for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
                for (int i = 0; i < C; ++i) {
                    const E* from = token + h * call.tokens.head + i * W;
                    const Vector<A> x = Tail ? load_first(from, channels_.tail) : load_wide(from);
#pragma GCC unroll 4
                    for (int q = 0; q < Queries; ++q) sums[q][h][i] += weights[q][t * G + h] * x;
                }
#pragma GCC unroll 4
        for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
            for (int h = 0; h < Heads; ++h) {
                const int64_t unit = (query + q) * units_.heads + head + h;
                A* to = call.sums + unit * channels_.padded() + c * W;
#pragma GCC unroll 4
                for (int i = 0; i < C; ++i, to += W) {
                    if (call.add) sums[q][h][i] += load_vector(to) * (call.factors ? call.factors[unit] : A(1));
                    store_vector(to, sums[q][h][i]);
                }
            }
    }

    const Units& units_;
    const Channels<A>& channels_;
};

INTERFORMER_ISA_END
