// The attention variant of a call: how the product of a query with a key becomes a score and a probability, and which
// keys a query sees. An option is a field here, with its checks, its gradient and its place in the tuples. Each backend
// maps and masks scores in one file: cpu/kernels/score_variant.h, cuda/attention_variant.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "common/activation_names.h"
#include "common/checks.h"
#include "common/tensor_view.h"

namespace interformer {

// The meaning of a prefix of keys: seen by all, whatever the masks, and its queries see all keys; seen by all whom
// causality lets see it; or one place, by which causality and windows compare.
enum class Prefix { full, keys, index };

Prefix parse_prefix(const std::string& name);

struct AttentionVariant {
    double scale = 1;            // factor of products of queries with keys
    bool default_scale = false;  // it is still to be set, to 1 / sqrt(D)
    Score score{true, Activation::identity};
    double post_scale = 1;  // factor of probabilities; 1 under softmax
    bool causal = false;
    int64_t window_left = -1, window_right = -1;  // -1: open
    int64_t num_prefix = 0;
    Prefix prefix = Prefix::full;
    int64_t full_tail = 0;        // the last queries before the targets, which ignore the window, as targets do
    double softcap = 0;           // 0: none
    bool queries_at_end = false;  // for distances, all queries stand behind the last key
    bool queries_apart = false;   // a query's bits do not depend on the number of its row's queries
    double dropout_p = 0;

    // Whether some weights are dropped, and others may not be.
    bool drops() const { return dropout_p > 0 && dropout_p < 1; }
};

// The tensors of the variant. Tables have the accumulation type; `Hb` is the number of heads, or 1 for all.
struct VariantTensors {
    std::optional<TensorView> num_targets;    // [B]: targets at the end of each row, clamped by kernels
    std::optional<TensorView> sinks;          // [H]
    std::optional<TensorView> position_bias;  // [Hb, 2 P + 1], by distances from -P to P
    std::optional<TensorView> time_bias;      // [Hb, N], by the number of edges up to a difference of times
    std::optional<TensorView> times_q;        // int64, of the queries' tokens
    std::optional<TensorView> times_k;        // int64 [Tk]
    std::optional<TensorView> time_edges;     // int64 [N - 1]
    std::optional<TensorView> dropout_seed;   // one int64; given where some weights are dropped
};

// Gradients of the variant's tensors, the last entries of the gradients' tuple, in the accumulation type.
struct VariantGradients {
    std::optional<TensorView> sinks, position_bias, time_bias;
};

// Reads the fields of the variant from the call's tuple, where they are neighbours. `next` is as in entries.h.
template <typename Reader>
void read(Reader& next, AttentionVariant& variant, VariantTensors& tensors) {
    constexpr int64_t kWidest = int64_t{1} << 62;  // longer than any row; adding a position cannot overflow
    const auto limit = [&](const char* name) {
        const int64_t tokens = next.integer(name);
        return tokens < kWidest ? tokens : kWidest;
    };
    variant.default_scale = !next.optional_number("scale", variant.scale);
    variant.score = next.choice("score", parse_score);
    variant.post_scale = next.number("post_scale");
    variant.causal = next.boolean("causal");
    variant.window_left = limit("window_left");
    variant.window_right = limit("window_right");
    variant.num_prefix = limit("num_prefix");
    variant.prefix = next.choice("prefix", parse_prefix);
    variant.full_tail = limit("full_tail");
    next.optional("num_targets", tensors.num_targets);
    variant.softcap = next.number("softcap");
    next.optional("sinks", tensors.sinks);
    next.optional("position_bias", tensors.position_bias);
    variant.queries_at_end = next.boolean("queries_at_end");
    variant.queries_apart = next.boolean("queries_apart");
    next.optional("time_bias", tensors.time_bias);
    next.optional("times_q", tensors.times_q);
    next.optional("times_k", tensors.times_k);
    next.optional("time_edges", tensors.time_edges);
    variant.dropout_p = next.number("dropout_p");
    next.optional("dropout_seed", tensors.dropout_seed);
}

template <typename Reader>
void read(Reader& next, VariantGradients& grads) {
    next.optional("grad_sinks", grads.sinks);
    next.optional("grad_position_bias", grads.position_bias);
    next.optional("grad_time_bias", grads.time_bias);
}

// The numbers of a variant.
inline void check_variant(const Checks& check, const AttentionVariant& variant) {
    const auto at_least = [&](const char* name, int64_t value, int64_t bound) {
        if (value < bound) check.refuse(name, "at least " + std::to_string(bound), std::to_string(value));
    };
    if (variant.default_scale) check.refuse("scale", "a number", "None");
    for (const auto& [name, value] : {std::pair{"scale", variant.scale}, {"post_scale", variant.post_scale}})
        if (!std::isfinite(value)) check.refuse(name, "finite", std::to_string(value));
    if (variant.score.softmax && variant.post_scale != 1)
        check.refuse("post_scale", "1 under softmax", std::to_string(variant.post_scale));
    at_least("window_left", variant.window_left, -1);
    at_least("window_right", variant.window_right, -1);
    at_least("num_prefix", variant.num_prefix, 0);
    at_least("full_tail", variant.full_tail, 0);
    if (!(std::isfinite(variant.softcap) && variant.softcap >= 0))
        check.refuse("softcap", "finite and at least 0", std::to_string(variant.softcap));
    if (!(variant.dropout_p >= 0 && variant.dropout_p <= 1))
        check.refuse("dropout_p", "from 0 to 1", std::to_string(variant.dropout_p));
}

}  // namespace interformer
