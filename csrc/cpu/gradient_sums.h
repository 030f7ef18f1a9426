#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/tensor_view.h"

namespace interformer {

// A gradient that is summed over rows, tokens or heads. Sums are kept in double for each row group (where rows are
// summed), each token that the output keeps and each head, then added in order. `to` is dense, [kept tokens, heads or
// 1, channels].
class GradientSums {
  public:
    GradientSums(const TensorView& to, int64_t groups, int64_t kept_tokens, int64_t heads)
        : to_(to),
          groups_(std::max<int64_t>(groups, 1)),  // without rows the sum is 0
          kept_tokens_(kept_tokens),
          heads_(heads),
          heads_to_(to.shape[to.axes - 2]),
          channels_(to.shape[to.axes - 1]),
          sums_(groups_ * group_stride()) {}

    int64_t group_stride() const { return kept_tokens_ * heads_ * channels_; }
    double* data() { return sums_.data(); }

    void write() {
        for (int64_t group = 1; group < groups_; ++group)
            for (int64_t i = 0; i < group_stride(); ++i) sums_[i] += sums_[group * group_stride() + i];
        if (to_.dtype == DType::float64)
            write_as<double>();
        else
            write_as<float>();
    }

  private:
    template <typename A>
    void write_as() {
        A* to = static_cast<A*>(to_.data);
        for (int64_t token = 0; token < kept_tokens_; ++token)
            for (int64_t c = 0; c < channels_; ++c) {
                double* first = sums_.data() + token * heads_ * channels_ + c;
                if (heads_to_ == 1)
                    for (int64_t h = 1; h < heads_; ++h) *first += first[h * channels_];
                for (int64_t h = 0; h < heads_to_; ++h)
                    to[(token * heads_to_ + h) * channels_ + c] = static_cast<A>(first[h * channels_]);
            }
    }

    TensorView to_;
    int64_t groups_, kept_tokens_, heads_, heads_to_, channels_;
    std::vector<double> sums_;
};

}  // namespace interformer
