// What both directions of PMA pooling share: the checks of their inputs, and the inputs typed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "cpu/attention.h"
#include "cpu/element.h"
#include "cpu/pma_pooling.h"
#include "cpu/rows.h"

namespace interformer {
namespace pma {

struct Sizes {
    int64_t B, M, H, Hk, T, D, Dv;

    int64_t group() const { return H / Hk; }
    int64_t queries() const { return M * group(); }  // that read one key/value head
    int64_t multiply_adds() const { return T * M * H * (D + Dv); }
};

// Checks everything in `in`, and that k and v can be read.
Sizes checked_sizes(const Checks& check, const PmaPoolingInputs& in);

// `x` has the output's shape.
void check_like_output(const Checks& check, const Sizes& n, const char* argument, const TensorView& x, DType dtype);

template <typename View>
std::optional<View> typed(const std::optional<TensorView>& view) {
    return view ? std::optional<View>(View(*view)) : std::nullopt;
}

// What both directions read, typed. The queries of a key/value head are its seeds: number `i` is that of seed
// `i / group` and of head `kv_head * group + i % group`. What belongs to queries lies in the order [Hk, queries].
template <typename T>
struct Problem {
    using A = Acc<T>;

    Sizes n;
    Rows rows;
    int64_t skip;
    A scale, post_scale;
    Score score;
    Gate gating;
    Strided<const T, 3> k, v;
    bool v_is_k;
    std::optional<Strided<const T, 4>> gate;
    std::vector<A> seeds;  // [Hk, queries, D]

    Problem(const Sizes& sizes, const PmaPoolingInputs& in)
        : n(sizes),
          rows(in.offsets, sizes.T),
          skip(std::min(in.skip_prefix, sizes.T)),
          scale(static_cast<A>(in.scale)),
          post_scale(static_cast<A>(in.post_scale)),
          score(in.score),
          gating(in.gating),
          k(in.k),
          v(in.v ? *in.v : in.k),
          v_is_k(!in.v),
          gate(typed<Strided<const T, 4>>(in.gate)),
          seeds(sizes.H * sizes.M * sizes.D) {
        const Strided<const T, 3> given(in.seeds);
        for_queries([&](int64_t i, int64_t m, int64_t h) {
            widen(given.at(m, h), given.strides[2], n.D, seeds.data() + i * n.D);
        });
    }

    // Calls `body(i, m, h)` for all queries of all heads in their order.
    template <typename Body>
    void for_queries(Body&& body) const {
        for (int64_t kv_head = 0; kv_head < n.Hk; ++kv_head) for_queries_of(kv_head, body);
    }
    template <typename Body>
    void for_queries_of(int64_t kv_head, Body&& body) const {
        int64_t i = kv_head * n.queries();
        for (int64_t m = 0; m < n.M; ++m)
            for (int64_t g = 0; g < n.group(); ++g) body(i++, m, kv_head * n.group() + g);
    }

    // The tokens of a row that are attended.
    Span attended_span(int64_t row) const {
        const Span span = rows.span(row);
        return {std::min(span.begin + skip, n.T), span.end};
    }

    Tile<A> keys(Span tokens, int64_t kv_head, A* buffer) const { return tile_of(k, tokens, kv_head, n.D, buffer); }
    Tile<A> values(Span tokens, int64_t kv_head, const Tile<A>& keys, A* buffer) const {
        return v_is_k ? keys : tile_of(v, tokens, kv_head, n.Dv, buffer);
    }
};

}  // namespace pma
}  // namespace interformer
