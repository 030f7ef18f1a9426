// The attention variant of a call: how the product of a query with a key becomes a score and a probability, and which
// keys a query sees. A bias or another mask is a field here, with its checks, its gradient and its place in the tuples.
// Each backend maps and masks scores in one file: cpu/kernels/score_variant.h, cuda/attention_variant.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>

#include "common/activation_names.h"
#include "common/checks.h"

namespace interformer {

struct AttentionVariant {
    double scale = 1;            // factor of products of queries with keys
    bool default_scale = false;  // it is still to be set, to 1 / sqrt(D)
    Score score{true, Activation::identity};
    double post_scale = 1;  // factor of probabilities; 1 under softmax
    bool causal = false;
    int64_t window_left = -1, window_right = -1;  // -1: open
    int64_t num_prefix = 0;
};

// Gradients of the variant's tensors, the last entries of the gradients' tuple. It has no tensor yet. A bias will be
// the first: it changes this file, and none of those that pass the gradients on to the kernels.
struct VariantGradients {};

// Reads the fields of the variant from the call's tuple, where they are neighbours. `next` is as in entries.h.
template <typename Reader>
void read(Reader& next, AttentionVariant& variant) {
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
}

template <typename Reader>
void read(Reader&, VariantGradients&) {}

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
}

inline void check_gradients(const Checks&, const AttentionVariant&, const VariantGradients&) {}

}  // namespace interformer
