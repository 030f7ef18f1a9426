// Edges between bins of times, and where to begin the search among them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/attention_problem.h"

namespace interformer {

// Few edges of 32 bits are searched by halving, whole vectors at a time, without reading memory at each number's own
// place (bias_tables.h). Others are searched from cells on.
//
// Numbers are divided into cells by their leading bits: the exponent of a double and the first `bits` of its fraction.
// A bin is searched from that of the cell's first number on, over the few edges inside of one cell. Whatever the edges
// hold, a search from a cell stays among them.
class TimeCells {
  public:
    TimeCells() = default;
    TimeCells(const int64_t* edges, int64_t count) : edges_(edges, edges + count) {
        edges_.push_back(std::numeric_limits<int64_t>::max());
        for (bits_ = 3; bits_ <= 6; bits_ += 3) {
            divide(count);
            if (steps_ <= 1) break;
        }
        bits_ = std::min<int64_t>(bits_, 6);
        const auto fits = [](int64_t edge) {
            return edge > std::numeric_limits<int32_t>::min() && edge < std::numeric_limits<int32_t>::max();
        };
        if (count <= TimeEdges::kHalved && std::all_of(edges, edges + count, fits)) divide_by_halves(count);
    }

    const int64_t* edges() const { return edges_.data(); }      // with one more behind the last
    const int32_t* first_bins() const { return bins_.data(); }  // of each cell; the first cell holds 0 alone
    int64_t bits() const { return bits_; }
    int64_t steps() const { return steps_; }  // the edges inside of a cell, at most
    const int32_t* halves() const { return halves_.empty() ? nullptr : halves_.data(); }

  private:
    void divide_by_halves(int64_t count) {
        constexpr int64_t kHalves = TimeEdges::kHalves, kHalvings = TimeEdges::kHalvings;
        halves_.assign(kHalves * kHalvings, std::numeric_limits<int32_t>::max());
        for (int64_t i = 0; i < kHalvings; ++i)
            for (int64_t part = 0, step = kHalves >> i; part < int64_t{1} << i; ++part)
                if (const int64_t edge = part * 2 * step + step - 1; edge < count)
                    halves_[static_cast<size_t>(i * kHalves + part)] =
                        static_cast<int32_t>(edges_[static_cast<size_t>(edge)]);
    }
    // The first number of cell `cell`, at least 1.
    int64_t first_number(int64_t cell) const {
        const int64_t word = ((int64_t{1023} << bits_) + cell - 1) << (52 - bits_);
        double number;
        std::memcpy(&number, &word, sizeof number);
        if (number >= 0x1p63) return std::numeric_limits<int64_t>::max();
        const auto whole = static_cast<int64_t>(number);
        return static_cast<double>(whole) < number ? whole + 1 : whole;
    }
    void divide(int64_t count) {
        const int64_t cells = (int64_t{63} << bits_) + 1;
        bins_.assign(static_cast<size_t>(cells), 0);
        steps_ = 0;
        int64_t bin = 0;
        for (int64_t cell = 0; cell < cells; ++cell) {
            const int64_t first = cell == 0 ? 0 : first_number(cell), before = bin;
            while (bin < count && edges_[static_cast<size_t>(bin)] < first) ++bin;
            if (cell > 0) steps_ = std::max(steps_, bin - before);
            while (bin < count && edges_[static_cast<size_t>(bin)] <= first) ++bin;
            bins_[static_cast<size_t>(cell)] = static_cast<int32_t>(bin);
        }
        steps_ = std::max(steps_, count - bin);
    }

    std::vector<int64_t> edges_;
    std::vector<int32_t> bins_, halves_;
    int64_t bits_ = 3, steps_ = 0;
};

}  // namespace interformer
