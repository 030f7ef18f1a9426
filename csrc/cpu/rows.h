// The rows of a jagged batch: where each lies, whatever the offsets hold, and how rows are grouped into work.
#pragma once

#include <cstdint>
#include <vector>

#include "common/tensor_view.h"

namespace interformer {

// The index of the first entry of `offsets` that is wrong (entry 0 not 0, an entry smaller than the one before it, an
// entry beyond `total`), or -1.
int64_t first_bad_offset(const TensorView& offsets, int64_t total);

// Row `b` of `total` tokens has `counts()[b]` tokens from `begins()[b]` on. Rows lie within [0, total] even where the
// offsets do not, and leave out their first `skip` tokens. They hold a copy, so that no other thread can change the
// offsets between the clamping and the use.
class Rows {
  public:
    Rows(const TensorView& offsets, int64_t total, int64_t skip = 0);

    int64_t count() const { return static_cast<int64_t>(counts_.size()); }
    const int64_t* begins() const { return begins_.data(); }
    const int64_t* counts() const { return counts_.data(); }
    int64_t longest() const { return longest_; }
    // Whether no row overlaps another.
    bool ordered() const { return ordered_; }

    // Calls `zero(begin, end)` for all tokens that no row holds, or for all tokens where rows overlap.
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

// Zeroes the tokens of a packed tensor that no row holds; each token is dense.
void zero_gaps(const Rows& rows, const TensorView& x);

// Row groups of a call without sums over rows: enough to balance threads, too few for their overhead to show.
constexpr int64_t kMaxRowGroups = 512;

// Groups of consecutive rows of about equal work: group `i` holds the rows [bound(i), bound(i + 1)). The groups follow
// from the work of the rows alone, never from the number of threads, so sums made group by group always have the same
// bits.
class RowGroups {
  public:
    // About `max_groups` groups at most; `work(row)` is an estimate.
    template <typename Work>
    RowGroups(int64_t rows, int64_t max_groups, Work&& work) {
        double total = 0;
        for (int64_t b = 0; b < rows; ++b) total += work(b);
        const double target = total / static_cast<double>(max_groups);
        double open = 0;
        for (int64_t b = 0; b < rows; ++b) {
            const double next = work(b);
            if (open > 0 && open + next > target) close(b, open);  // a long row does not join shorter ones before it
            open += next;
            if (open >= target || b + 1 == rows) close(b + 1, open);
        }
        total_ = total;
        schedule(target);
    }

    int64_t count() const { return static_cast<int64_t>(work_.size()); }
    int64_t bound(int64_t i) const { return bounds_[i]; }
    // The i-th group to start. Groups of more work than most come first, so that none is left for the end; the others
    // follow in the order of memory, which the processor prefetches.
    int64_t scheduled(int64_t i) const { return order_[i]; }
    double work(int64_t i) const { return work_[i]; }
    double total() const { return total_; }
    // The group of each row.
    std::vector<int64_t> by_row() const {
        std::vector<int64_t> groups;
        groups.reserve(static_cast<size_t>(bounds_.back()));
        for (int64_t group = 0; group < count(); ++group) groups.resize(static_cast<size_t>(bound(group + 1)), group);
        return groups;
    }

  private:
    void close(int64_t end, double& open) {
        bounds_.push_back(end);
        work_.push_back(open);
        open = 0;
    }
    void schedule(double target);

    std::vector<int64_t> bounds_{0}, order_;
    std::vector<double> work_;
    double total_ = 0;
};

}  // namespace interformer
