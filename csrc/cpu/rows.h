// Rows of a jagged batch: where each lies, whatever the offsets hold, and how rows are shared out.
#pragma once

#include <cstdint>
#include <vector>

#include "common/tensor_view.h"

namespace interformer {

// Index of the first entry of `offsets` that is wrong (entry 0 not 0, an entry smaller than the one before it, an entry
// beyond `total`), or -1.
int64_t first_bad_offset(const TensorView& offsets, int64_t total);

// Row `b` of `total` tokens has `counts()[b]` tokens from `begins()[b]` on: within [0, total] even where the offsets
// are not, and without the first `skip` tokens of each row. Made of a copy of the offsets, so that nobody can change
// them between their clamping and their use.
class Rows {
  public:
    Rows(const TensorView& offsets, int64_t total, int64_t skip = 0);

    int64_t count() const { return static_cast<int64_t>(counts_.size()); }
    const int64_t* begins() const { return begins_.data(); }
    const int64_t* counts() const { return counts_.data(); }
    int64_t longest() const { return longest_; }
    // Whether no row overlaps another.
    bool ordered() const { return ordered_; }

    // Calls `zero(begin, end)` for all tokens that no row holds, or, where rows overlap, for all tokens.
    template <typename Zero>
    void for_gaps(Zero&& zero) const {
        if (!ordered_) return zero(int64_t{0}, total_);
        int64_t end = 0;
        for (int64_t b = 0; b < count(); ++b) {
            if (begins_[b] > end) zero(end, begins_[b]);
            end = begins_[b] + counts_[b] > end ? begins_[b] + counts_[b] : end;
        }
        if (end < total_) zero(end, total_);
    }

  private:
    std::vector<int64_t> begins_, counts_;
    int64_t total_, longest_ = 0;
    bool ordered_ = true;
};

// Zeroes the tokens of a dense packed tensor that no row holds.
void zero_gaps(const Rows& rows, const TensorView& x);

// Runs for a call without sums over rows: enough to share out evenly, few enough to cost nothing.
constexpr int64_t kMostRuns = 512;

// Runs of consecutive rows of about equal work: run `i` holds the rows [cut(i), cut(i + 1)). They depend on the work of
// the rows alone, never on the number of threads, so sums that are made run by run always have the same bits.
class Runs {
  public:
    // At most about `most` runs; `work(row)` of each row.
    template <typename Work>
    Runs(int64_t rows, int64_t most, Work&& work) {
        double total = 0;
        for (int64_t b = 0; b < rows; ++b) total += work(b);
        const double share = total / static_cast<double>(most);
        double open = 0;
        for (int64_t b = 0; b < rows; ++b) {
            const double next = work(b);
            if (open > 0 && open + next > share) close(b, open);  // a long row does not wait behind short ones
            open += next;
            if (open >= share || b + 1 == rows) close(b + 1, open);
        }
        total_ = total;
        put_in_order(share);
    }

    int64_t count() const { return static_cast<int64_t>(work_.size()); }
    int64_t cut(int64_t i) const { return cuts_[i]; }
    // Runs in the order in which to start them: rows of more work than most runs first, so that none is left for the
    // end, the others as they lie in memory, which is read ahead then.
    int64_t in_order(int64_t i) const { return order_[i]; }
    double work(int64_t i) const { return work_[i]; }
    double total() const { return total_; }

  private:
    void close(int64_t end, double& open) {
        cuts_.push_back(end);
        work_.push_back(open);
        open = 0;
    }
    void put_in_order(double share);

    std::vector<int64_t> cuts_{0}, order_;
    std::vector<double> work_;
    double total_ = 0;
};

}  // namespace interformer
