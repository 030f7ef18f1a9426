// Options of the attention variant that few calls have. A call with any of them runs kernels of its own, so that plain
// ones pay nothing for them, neither instructions nor registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/attention_call.h"
#include "cuda/attention_option_masks.cuh"

namespace interformer {
namespace cuda {

struct Options {
    bool any;
    OptionMasks masks;

    explicit Options(const AttentionInputs& in) : masks(in.variant, in.variant_tensors) {
        any = masks.kind != Prefix::full || masks.full_tail > 0 || in.variant_tensors.num_targets;
    }
};

// Keys that a query sees, of calls with options or without.
template <bool OPTIONS>
using KeysOf = std::conditional_t<OPTIONS, KeySet, KeyRange>;

// Calls `function` with a type that says whether the call has options.
template <typename Function>
void with_options(const Options& options, Function&& function) {
    if (options.any) return function(std::true_type{});
    function(std::false_type{});
}

}  // namespace cuda
}  // namespace interformer
