// Products of few queries with tokens: their scores, and the gradients of their probabilities.
#pragma once

#include "cpu/kernels/few_queries.h"
#include "cpu/kernels/multiply.h"

INTERFORMER_ISA_BEGIN

// ---------------------------------------------------------------- sums of lanes

// `low` and `high` choose lanes of two vectors; the chosen ones are added.
template <typename A, typename Low, typename High>
INTERFORMER_INLINE Vector<A> add_lanes(Vector<A> a, Vector<A> b, Low&& low_of, High&& high_of) {
    Vector<typename IndexOf<A>::type> low, high;
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes<A>; ++lane) {
        low[lane] = low_of(lane);
        high[lane] = high_of(lane);
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Halves the numbers that each 128-bit part still has of each unit of `a` and `b`, and puts them side by side: first
// `a` and `b` have one unit each (`Have` 1), then two.
template <typename A, int Have>
INTERFORMER_INLINE Vector<A> join_units(Vector<A> a, Vector<A> b) {
    constexpr int G = kGroup<A>, W = kLanes<A>;
    const auto lane_of = [](int lane) {
        const int j = lane % G, piece = j / Have;
        return lane - j + piece / 2 * Have + j % Have + piece % 2 * W;
    };
    return add_lanes<A>(a, b, lane_of, [&](int lane) { return lane_of(lane) + G / 2; });
}

// The sums of each 128-bit part of `kGroup` vectors, side by side.
template <typename A>
INTERFORMER_INLINE Vector<A> join_group(const Vector<A>* x) {
    if constexpr (kGroup<A> == 4)
        return join_units<A, 2>(join_units<A, 1>(x[0], x[1]), join_units<A, 1>(x[2], x[3]));
    else
        return join_units<A, 1>(x[0], x[1]);
}

// Adds the 128-bit parts of each of `Count` joined vectors. The result has one part for each.
template <typename A, int64_t Count = kVectorTokens<A>>
INTERFORMER_INLINE Vector<A> join_tokens(const A* joined) {
    constexpr int G = kGroup<A>, W = kLanes<A>, half = kVectorTokens<A> / 2;
    if constexpr (Count == 1) {
        return load_vector(joined);
    } else {
        const auto lane_of = [](int lane) {
            const int part = lane / G;
            return part % half * 2 * G + lane % G + part / half * W;
        };
        return add_lanes<A>(join_tokens<A, Count / 2>(joined), join_tokens<A, Count / 2>(joined + Count / 2 * W),
                            lane_of, [&](int lane) { return lane_of(lane) + G; });
    }
}

// ---------------------------------------------------------------- turned vectors

// Whether tokens are turned for their products. It costs two shuffles for each of their vectors, once for all queries;
// adding up lanes instead costs nine instructions for a group of each query, whatever the channels. The heads do not
// matter, which tasks may divide.
template <typename A>
inline bool turns(const Units& units, const Channels<A>& channels) {
    return channels.padded() <= units.queries * kLanes<A>;
}

// Transposes the squares that the 128-bit parts of `kGroup` vectors form: lane j of each part of vector i was lane i of
// that part of vector j.
template <typename A>
INTERFORMER_INLINE void turn_group(Vector<A>* x) {
    if constexpr (kGroup<A> == 4) {
        exchange<A, 2>(x[0], x[2]);
        exchange<A, 2>(x[1], x[3]);
        exchange<A, 1>(x[2], x[3]);
    }
    exchange<A, 1>(x[0], x[1]);
}

// Turns rows of units, padded with zeros to whole vectors and groups, for `TokenDots`: each vector of channels of a
// group, [groups, vectors, kGroup].
template <typename A>
inline void turn_rows(const A* rows, int64_t groups, const Channels<A>& channels, A* to) {
    constexpr int64_t W = kLanes<A>;
    const int64_t padded = channels.padded();
    for (int64_t group = 0; group < groups; ++group, rows += kGroup<A> * padded)
        for (int64_t c = 0; c < padded; c += W, to += kGroup<A> * W) {
            Vector<A> x[kGroup<A>];
#pragma GCC unroll 4
            for (int i = 0; i < kGroup<A>; ++i) x[i] = load_vector(rows + i * padded + c);
            turn_group<A>(x);
#pragma GCC unroll 4
            for (int i = 0; i < kGroup<A>; ++i) store_vector(to + i * W, x[i]);
        }
}

// ---------------------------------------------------------------- dot products

// to[unit][t] = <rows[unit], tokens[t] under the unit's head> for up to `kTokenBlock` tokens. Tokens up to the end of a
// vector get numbers without a meaning. Rows are padded with zeros to whole vectors and groups, and turned where
// `turns` says so. The heads of a group are turned then, too: a product has the channels of all units of a group in its
// lanes, and only its 128-bit parts are left to be added.
template <typename E>
class TokenDots {
  public:
    using A = Acc<E>;

    TokenDots(const Units& units, const Channels<A>& channels) : units_(units), channels_(channels) {}

    void operator()(const HeadTokens<const E>& tokens, int64_t count, const A* rows, UnitNumbers<A> to,
                    const TokensAhead& ahead = {}) const {
        A joined[kFewUnits / G * kTokenBlock * W];
        if (channels_.tail == 0 && channels_.vectors == 1)
            products<1>(tokens, count, rows, joined, ahead);
        else if (channels_.tail == 0 && channels_.vectors == 2)
            products<2>(tokens, count, rows, joined, ahead);
        else if (channels_.tail == 0 && channels_.vectors == 4 && W == 16)
            products<4>(tokens, count, rows, joined, ahead);
        else
            products<0>(tokens, count, rows, joined, ahead);
        for (int64_t group = 0; group < units_.groups<A>(); ++group) {
            A* sums = joined + group * kTokenBlock * W;
            for (int64_t t = count; t % kVectorTokens<A> != 0; ++t) store_vector(sums + t * W, Vector<A>{});
            for (int64_t t = 0; t < count; t += kVectorTokens<A>)
                store_vector(to.data + group * to.stride + t * G, join_tokens<A>(sums + t * W));
        }
    }

  private:
    static constexpr int64_t G = kGroup<A>, W = kLanes<A>;

    // C: vectors of a head; 0: any number, and a tail.
    template <int C>
    void products(const HeadTokens<const E>& tokens, int64_t count, const A* rows, A* joined,
                  const TokensAhead& ahead) const {
        const bool turned = turns(units_, channels_), whole = C > 0 && units_.heads % G == 0;
        for (int64_t t = 0; t < count; ++t) {
            const E* token = tokens.data + t * tokens.token;
            A* to = joined + t * W;
            if (whole) ahead.fetch(t);
            if (whole && turned)
                whole_groups<C>(token, tokens.head, rows, to);
            else if (whole)
                whole_groups_by_lane<C>(token, tokens.head, rows, to);
            else if (turned)
                any_groups<C>(token, tokens.head, rows, to);
            else
                any_groups_by_lane<C>(token, tokens.head, rows, to);
        }
    }

    // Groups are heads that lie side by side, under one query.
    template <int C>
    INTERFORMER_INLINE void whole_groups_by_lane(const E* token, int64_t head_stride, const A* rows, A* joined) const {
        for (int64_t head = 0; head < units_.heads; head += G) {
            Vector<A> x[G][C + 1];
#pragma GCC unroll 4
            for (int i = 0; i < G; ++i)
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) x[i][c] = load_wide(token + (head + i) * head_stride + c * W);
            for (int64_t query = 0; query < units_.queries; ++query) {
                const int64_t unit = query * units_.heads + head;
                Vector<A> sums[G];
#pragma GCC unroll 4
                for (int i = 0; i < G; ++i) {
                    const A* row = rows + (unit + i) * C * W;
                    sums[i] = x[i][0] * load_vector(row);
#pragma GCC unroll 4
                    for (int c = 1; c < C; ++c) sums[i] += x[i][c] * load_vector(row + c * W);
                }
                store_vector(joined + unit / G * kTokenBlock * W, join_group<A>(sums));
            }
        }
    }

    template <int C>
    INTERFORMER_INLINE void any_groups_by_lane(const E* token, int64_t head_stride, const A* rows, A* joined) const {
        const int64_t padded = channels_.padded();
        int64_t head = 0;
        for (int64_t unit = 0; unit < units_.count(); unit += G) {
            Vector<A> sums[G];
#pragma GCC unroll 4
            for (int i = 0; i < G; ++i) {
                sums[i] = product<C>(token + head * head_stride, rows + (unit + i) * padded);
                if (++head == units_.heads) head = 0;
            }
            store_vector(joined + unit / G * kTokenBlock * W, join_group<A>(sums));
        }
    }

    template <int C>
    INTERFORMER_INLINE Vector<A> product(const E* x, const A* row) const {
        Vector<A> sum{};
        const int64_t vectors = C > 0 ? C : channels_.vectors;
#pragma GCC unroll 4
        for (int64_t c = 0; c < vectors; ++c) sum += load_wide(x + c * W) * load_vector(row + c * W);
        if (C == 0 && channels_.tail > 0)
            sum += load_first(x + vectors * W, channels_.tail) * load_vector(row + vectors * W);
        return sum;
    }

    // The same with turned tokens and rows.
    template <int C>
    INTERFORMER_INLINE void whole_groups(const E* token, int64_t head_stride, const A* rows, A* joined) const {
        for (int64_t head = 0; head < units_.heads; head += G) {
            Vector<A> x[C + 1][G];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
                for (int i = 0; i < G; ++i) x[c][i] = load_wide(token + (head + i) * head_stride + c * W);
                turn_group<A>(x[c]);
            }
            for (int64_t query = 0; query < units_.queries; ++query) {
                const int64_t group = (query * units_.heads + head) / G;
                Vector<A> sum{};
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) add_products(x[c], rows + (group * C + c) * G * W, sum);
                store_vector(joined + group * kTokenBlock * W, sum);
            }
        }
    }

    template <int C>
    INTERFORMER_INLINE void any_groups(const E* token, int64_t head_stride, const A* rows, A* joined) const {
        const int64_t whole = C > 0 ? C * W : channels_.vectors * W, padded = channels_.padded();
        int64_t head = 0;
        for (int64_t unit = 0; unit < units_.count(); unit += G) {
            const E* from[G];
#pragma GCC unroll 4
            for (int i = 0; i < G; ++i) {
                from[i] = token + head * head_stride;
                if (++head == units_.heads) head = 0;
            }
            Vector<A> sum{};
            for (int64_t c = 0; c < padded; c += W, rows += G * W) {
                Vector<A> x[G];
#pragma GCC unroll 4
                for (int i = 0; i < G; ++i)
                    x[i] = C > 0 || c < whole ? load_wide(from[i] + c) : load_first(from[i] + c, channels_.tail);
                turn_group<A>(x);
                add_products(x, rows, sum);
            }
            store_vector(joined + unit / G * kTokenBlock * W, sum);
        }
    }

    static INTERFORMER_INLINE void add_products(const Vector<A>* x, const A* rows, Vector<A>& sum) {
#pragma GCC unroll 4
        for (int i = 0; i < G; ++i) sum += x[i] * load_vector(rows + i * W);
    }

    const Units& units_;
    const Channels<A>& channels_;
};

INTERFORMER_ISA_END
