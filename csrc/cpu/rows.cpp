#include "cpu/rows.h"

#include <algorithm>

namespace interformer {

namespace {

template <typename Index>
int64_t first_bad(const TensorView& offsets, int64_t total) {
    const Strided<const Index, 1> entries(offsets);
    int64_t before = 0;
    for (int64_t i = 0; i < offsets.shape[0]; ++i) {
        const int64_t entry = *entries.at(i);
        if (entry < before || entry > total || (i == 0 && entry != 0)) return i;
        before = entry;
    }
    return -1;
}

template <typename Index>
void copy_clamped(const TensorView& offsets, int64_t total, std::vector<int64_t>& edges) {
    const Strided<const Index, 1> entries(offsets);
    for (int64_t i = 0; i < offsets.shape[0]; ++i) edges[i] = std::clamp<int64_t>(*entries.at(i), 0, total);
}

}  // namespace

int64_t first_bad_offset(const TensorView& offsets, int64_t total) {
    return offsets.dtype == DType::int32 ? first_bad<int32_t>(offsets, total) : first_bad<int64_t>(offsets, total);
}

Rows::Rows(const TensorView& offsets, int64_t total) : edges_(offsets.shape[0]), total_(total) {
    if (offsets.dtype == DType::int32)
        copy_clamped<int32_t>(offsets, total, edges_);
    else
        copy_clamped<int64_t>(offsets, total, edges_);
    ordered_ = std::is_sorted(edges_.begin(), edges_.end());
}

std::vector<int64_t> Rows::cuts(int64_t most) const {
    constexpr int64_t kRowWork = 8;  // what a row costs beside its tokens, in tokens
    int64_t work = 0;
    for (int64_t b = 0; b < count(); ++b) work += kRowWork + span(b).size();
    const int64_t share = (work + most - 1) / most;
    std::vector<int64_t> cuts{0};
    int64_t open = 0;
    for (int64_t b = 0; b < count(); ++b) {
        open += kRowWork + span(b).size();
        if (open >= share || b + 1 == count()) {
            cuts.push_back(b + 1);
            open = 0;
        }
    }
    return cuts;
}

}  // namespace interformer
