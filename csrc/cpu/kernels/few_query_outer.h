// Outer products of few queries: the gradients of tokens, written under all heads in the order of memory.
#pragma once

#include "cpu/kernels/few_queries.h"

INTERFORMER_ISA_BEGIN

// Numbers of units, and rows of channels, one for each unit, padded to whole vectors.
template <typename A>
struct UnitRows {
    UnitNumbers<const A> numbers;
    const A* rows;
};

// to[t] under a head = sum over the head's units of numbers[unit][t] * rows[unit], and of the terms of `more`, if
// given.
template <typename E>
class OuterProducts {
  public:
    using A = Acc<E>;

    // `stream`: past the caches. Then the addresses of all vectors must be multiples of their bytes.
    OuterProducts(const Units& units, const Channels<A>& channels, bool stream = false)
        : units_(units), channels_(channels), stream_(stream && channels.tail == 0 && channels.vectors <= 2) {}

    void operator()(const UnitRows<A>& terms, const UnitRows<A>* more, int64_t count, const HeadTokens<E>& to,
                    const TokensAhead& ahead = {}) const {
        const Call call{terms, more, count, to, ahead};
        if (units_.heads % G == 0)
            all_tokens<G>(call);
        else
            all_tokens<1>(call);
    }

  private:
    static constexpr int64_t G = kGroup<A>, W = kLanes<A>;

    struct Call {
        const UnitRows<A>& terms;
        const UnitRows<A>* more;
        int64_t count;
        const HeadTokens<E>& to;
        const TokensAhead& ahead;
    };

    static constexpr int kMaxRows = kTileRows > 8 ? 16 : 8;  // that registers hold beside the sums

    template <int Heads>
    void all_tokens(const Call& call) const {
        if constexpr (Heads == G)
            if (channels_.tail == 0 && channels_.vectors == 1 && units_.heads == G && !call.more) {
                if (units_.queries == 2) return stream_ ? held_rows<2, true>(call) : held_rows<2, false>(call);
                if constexpr (4 * G <= kMaxRows)
                    if (units_.queries == 4) return stream_ ? held_rows<4, true>(call) : held_rows<4, false>(call);
            }
        if (channels_.tail == 0 && channels_.vectors == 1)
            stream_ ? tokens<Heads, 1, true>(call) : tokens<Heads, 1, false>(call);
        else if (channels_.tail == 0 && channels_.vectors == 2)
            stream_ ? tokens<Heads, 2, true>(call) : tokens<Heads, 2, false>(call);
        else
            tokens<Heads, 0, false>(call);
    }

    // All rows are in registers: one group of heads of one vector each.
    template <int Queries, bool Stream>
    void held_rows(const Call& call) const {
        Vector<A> rows[Queries][G];
        const A* numbers[Queries];
#pragma GCC unroll 4
        for (int q = 0; q < Queries; ++q) {
            numbers[q] = call.terms.numbers.of_unit(q * G);
#pragma GCC unroll 4
            for (int h = 0; h < G; ++h) rows[q][h] = load_vector(call.terms.rows + (q * G + h) * W);
        }
        for (int64_t t = 0; t < call.count; ++t) {
            call.ahead.fetch(t);
            E* to = call.to.data + t * call.to.token;
#pragma GCC unroll 4
            for (int h = 0; h < G; ++h) {
                Vector<A> sum = numbers[0][t * G + h] * rows[0][h];
#pragma GCC unroll 4
                for (int q = 1; q < Queries; ++q) sum += numbers[q][t * G + h] * rows[q][h];
                if constexpr (Stream)
                    stream_wide(to + h * call.to.head, sum);
                else
                    store_wide(to + h * call.to.head, sum);
            }
        }
    }

    // C: vectors of a head; 0: any number, and a tail.
    template <int Heads, int C, bool Stream>
    void tokens(const Call& call) const {
        const HeadTokens<E>& to = call.to;
        for (int64_t t = 0; t < call.count; ++t) {
            call.ahead.fetch(t);
            for (int64_t head = 0; head < units_.heads; head += Heads) {
                E* first = to.data + t * to.token + head * to.head;
                if constexpr (C > 0) {
                    tile<Heads, C>(call, t, head, 0, [&](int h, int c, Vector<A> sum) {
                        if constexpr (Stream)
                            stream_wide(first + h * to.head + c * W, sum);
                        else
                            store_wide(first + h * to.head + c * W, sum);
                    });
                } else {
                    any_channels<Heads>(call, t, head, first);
                }
            }
        }
    }

    template <int Heads>
    void any_channels(const Call& call, int64_t t, int64_t head, E* first) const {
        const int64_t whole = channels_.vectors, stride = call.to.head;
        for (int64_t c = 0; c < whole; ++c)
            tile<Heads, 1>(call, t, head, c,
                           [&](int h, int, Vector<A> sum) { store_wide(first + h * stride + c * W, sum); });
        if (channels_.tail > 0)
            tile<Heads, 1>(call, t, head, whole, [&](int h, int, Vector<A> sum) {
                store_first(first + h * stride + whole * W, channels_.tail, sum);
            });
    }

    template <int Heads, int C, typename Store>
    INTERFORMER_INLINE void tile(const Call& call, int64_t t, int64_t head, int64_t c, Store&& store) const {
        Vector<A> sums[Heads][C];
        add<Heads, C, true>(call.terms, t, head, c, 0, sums);
        for (int64_t query = 1; query < units_.queries; ++query)
            add<Heads, C, false>(call.terms, t, head, c, query, sums);
        if (call.more)
            for (int64_t query = 0; query < units_.queries; ++query)
                add<Heads, C, false>(*call.more, t, head, c, query, sums);
#pragma GCC unroll 4
        for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
            for (int i = 0; i < C; ++i) store(h, i, sums[h][i]);
    }

    template <int Heads, int C, bool First>
    INTERFORMER_INLINE void add(const UnitRows<A>& terms, int64_t t, int64_t head, int64_t c, int64_t query,
                                Vector<A> (&sums)[Heads][C]) const {
        const int64_t unit = query * units_.heads + head, padded = C == 1 ? channels_.padded() : C * W;
        const A* numbers = terms.numbers.of_unit(unit) + t * G;
        const A* rows = terms.rows + unit * padded + c * W;
#pragma GCC unroll 4
        for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
            for (int i = 0; i < C; ++i) {
                const Vector<A> row = load_vector(rows + h * padded + i * W);
                sums[h][i] = First ? numbers[h] * row : sums[h][i] + numbers[h] * row;
            }
    }

    const Units& units_;
    const Channels<A>& channels_;
    const bool stream_;
};

INTERFORMER_ISA_END
