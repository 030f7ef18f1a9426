// Rows of a jagged batch: where each lies, whatever the offsets hold, and how rows are shared out.
#pragma once

#include <cstdint>
#include <vector>

#include "common/tensor_view.h"

namespace interformer {

struct Span {
    int64_t begin;
    int64_t end;

    int64_t size() const { return end > begin ? end - begin : 0; }
};

// Index of the first entry of `offsets` that is wrong (entry 0 not 0, an entry smaller than the one before it, an entry
// beyond `total`), or -1.
int64_t first_bad_offset(const TensorView& offsets, int64_t total);

// Row `b` of `total` tokens is `span(b)`: within [0, total] even where the offsets are not. Made of a copy of the
// offsets, so that nobody can change them between their clamping and their use.
class Rows {
  public:
    Rows(const TensorView& offsets, int64_t total);

    int64_t count() const { return static_cast<int64_t>(edges_.size()) - 1; }
    Span span(int64_t row) const { return {edges_[row], edges_[row + 1]}; }
    // Tokens before the first row and after the last one, which belong to no row.
    Span head() const { return {0, edges_.front()}; }
    Span tail() const { return {edges_.back(), total_}; }
    // Whether no row overlaps another.
    bool ordered() const { return ordered_; }

    // Cuts the rows into at most `most` runs of about equal work (tokens, and a little for each row); run `i` holds the
    // rows [cuts[i], cuts[i + 1]). Depends on the offsets alone, never on the number of threads.
    std::vector<int64_t> cuts(int64_t most) const;

  private:
    std::vector<int64_t> edges_;
    int64_t total_;
    bool ordered_ = true;
};

}  // namespace interformer
