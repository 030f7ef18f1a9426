#include "cpu/rows.h"

#include <algorithm>
#include <cstring>
#include <numeric>

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

// Calls `each(begin, end)` for every row, clamped to the tokens.
template <typename Index, typename Each>
void for_rows(const TensorView& offsets, int64_t total, Each&& each) {
    const Strided<const Index, 1> entries(offsets);
    int64_t begin = std::clamp<int64_t>(*entries.at(0), 0, total);
    for (int64_t i = 1; i < offsets.shape[0]; ++i) {
        const int64_t end = std::clamp<int64_t>(*entries.at(i), 0, total);
        each(begin, end);
        begin = end;
    }
}

}  // namespace

int64_t first_bad_offset(const TensorView& offsets, int64_t total) {
    return offsets.dtype == DType::int32 ? first_bad<int32_t>(offsets, total) : first_bad<int64_t>(offsets, total);
}

Rows::Rows(const TensorView& offsets, int64_t total, int64_t skip) : total_(total) {
    begins_.reserve(offsets.shape[0] - 1);
    counts_.reserve(offsets.shape[0] - 1);
    const auto add = [&](int64_t begin, int64_t end) {
        ordered_ = ordered_ && begin <= end;
        begin += std::min(skip, total - begin);
        begins_.push_back(begin);
        counts_.push_back(std::max<int64_t>(end - begin, 0));
        longest_ = std::max(longest_, counts_.back());
    };
    if (offsets.dtype == DType::int32)
        for_rows<int32_t>(offsets, total, add);
    else
        for_rows<int64_t>(offsets, total, add);
}

void zero_gaps(const Rows& rows, const TensorView& x) {
    int64_t token = x.dtype == DType::float64 ? 8 : x.dtype == DType::float32 ? 4 : 2;  // bytes
    for (int axis = 1; axis < x.axes; ++axis) token *= x.shape[axis];
    const int64_t stride = x.strides[0] * x.raw_type.bits / 8;
    char* const data = static_cast<char*>(x.data);
    rows.for_gaps([&](int64_t begin, int64_t end) {
        if (stride == token) {
            std::memset(data + begin * token, 0, static_cast<size_t>((end - begin) * token));
        } else {
            for (int64_t t = begin; t < end; ++t) std::memset(data + t * stride, 0, static_cast<size_t>(token));
        }
    });
}

void RowGroups::schedule(double target) {
    order_.resize(work_.size());
    std::iota(order_.begin(), order_.end(), int64_t{0});
    const auto light =
        std::stable_partition(order_.begin(), order_.end(), [&](int64_t group) { return work_[group] > 2 * target; });
    std::stable_sort(order_.begin(), light, [&](int64_t a, int64_t b) { return work_[a] > work_[b]; });
}

}  // namespace interformer
