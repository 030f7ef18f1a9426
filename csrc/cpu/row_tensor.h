// Tensors of a jagged batch as the kernels see them: plain pointers and numbers.
#pragma once

#include <cstdint>

namespace interformer {

// A tensor addressed by (row of the batch, token of the row, head, channel). Where the tokens of all rows are packed,
// `begins[row]` is the row's first token; else rows are `row` numbers apart (0: all rows share the tensor).
struct RowTensor {
    void* data = nullptr;
    const int64_t* begins = nullptr;
    int64_t row = 0, token = 0, head = 0, channel = 0;
    bool given = false;
};

struct RotaryTables {
    const float* cos = nullptr;  // null: no rotary embedding
    const float* sin = nullptr;
    int64_t cos_stride = 0, sin_stride = 0;
    int64_t positions = 0;  // P, rows of the tables
    int64_t half = 0;       // R / 2
    bool interleaved = false;
};

// Rotary positions of packed tokens. Without either, the position is the index in the row.
struct Positions {
    const int32_t* narrow = nullptr;
    const int64_t* wide = nullptr;
    int64_t stride = 1;
};

}  // namespace interformer
