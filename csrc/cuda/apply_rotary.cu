#include "cuda/apply_rotary.h"

#include <algorithm>
#include <cstdint>

#include "cuda/elements.h"
#include "cuda/instructions.cuh"
#include "cuda/rotary.cuh"
#include "cuda/rows.cuh"

namespace interformer {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kNumbers = 8192;  // numbers of a block

template <typename T>
struct Rotation {
    const T* x;
    T* out;
    const float *cos, *sin;
    Indices positions;  // null: a token's position is its index in the row
    int64_t x_token, x_head, cos_row, sin_row, table_rows;
    int heads, channels, half;
    int pairs;  // (token, head) pairs of a block
    bool backwards;
};

// Numbers that are read and written by one instruction.
template <typename T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Vector {
    T at[WIDTH];
};

// Rotates WIDTH pairs of channels, from pair `c` on: (c, c + half), or (2 c, 2 c + 1) if interleaved.
template <typename T, int WIDTH, bool INTERLEAVED>
__device__ void rotate(const Rotation<T>& p, const T* from, T* to, const float* cos, const float* sin, int c) {
    using V = Vector<T, WIDTH>;
    const int places[2] = {INTERLEAVED ? 2 * c : c, INTERLEAVED ? 2 * c + WIDTH : c + p.half};
    V in[2], out[2];
    for (int i = 0; i < 2; ++i) in[i] = *reinterpret_cast<const V*>(from + places[i]);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        // Places in both vectors together: 2 i and 2 i + 1 if interleaved, else i and i + WIDTH.
        const int a = INTERLEAVED ? 2 * i : i, b = INTERLEAVED ? 2 * i + 1 : i + WIDTH;
        float x = widen(in[a / WIDTH].at[a % WIDTH]), y = widen(in[b / WIDTH].at[b % WIDTH]);
        rotate_pair(x, y, cos[c + i], p.backwards ? -sin[c + i] : sin[c + i]);
        out[a / WIDTH].at[a % WIDTH] = narrow<T>(x);
        out[b / WIDTH].at[b % WIDTH] = narrow<T>(y);
    }
    for (int i = 0; i < 2; ++i) *reinterpret_cast<V*>(to + places[i]) = out[i];
}

// Rotates the first `2 half` channels of (token, head) pairs of any rows; tokens of no row get zeros.
template <typename T, int WIDTH, bool INTERLEAVED>
__global__ void __launch_bounds__(kThreads)
    rotate_rows(const __grid_constant__ Rotation<T> p, const __grid_constant__ Offsets offsets) {
    using V = Vector<T, WIDTH>;
    const int64_t begin = int64_t{blockIdx.x} * p.pairs, end = min(begin + p.pairs, offsets.tokens * p.heads);
    // All rows of the block lie between those of its first and last token, so later searches are short.
    const int64_t low = offsets.row_between(begin / p.heads, 0, offsets.rows);
    const int64_t high = offsets.row_between((end - 1) / p.heads, low, offsets.rows);
    // The tasks of a pair: `half / WIDTH` rotations of two vectors, and copies of the remaining vectors.
    const int rotations = p.half / WIDTH, tasks = p.channels / WIDTH - rotations;
    const int count = static_cast<int>(end - begin) * tasks;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const int64_t pair = begin + i / tasks;
        const int task = i % tasks;
        const int64_t token = pair / p.heads, head = pair % p.heads;
        const int64_t row = offsets.row_between(token, low, high), n = token - offsets.edge(row);
        const T* from = p.x + token * p.x_token + head * p.x_head;
        T* to = p.out + pair * p.channels;
        if (row == offsets.rows || n < 0) {
            for (int vector = task; vector < p.channels / WIDTH; vector += tasks)
                *reinterpret_cast<V*>(to + vector * WIDTH) = V{};
        } else if (task < rotations) {
            const int64_t position = p.positions.entries == nullptr ? n : p.positions[token];
            const int64_t place = min(max(position, int64_t{0}), p.table_rows - 1);
            rotate<T, WIDTH, INTERLEAVED>(p, from, to, p.cos + place * p.cos_row, p.sin + place * p.sin_row,
                                          task * WIDTH);
        } else {
            const int copied = (task + rotations) * WIDTH;
            *reinterpret_cast<V*>(to + copied) = *reinterpret_cast<const V*>(from + copied);
        }
    }
}

}  // namespace

void apply_rotary(const RotaryInputs& in, const RotaryOutputs& outputs, const Stream& stream) {
    const Checks check = stream.checks();
    check_call(check, in, outputs);
    check.contiguous_last_axis("x", in.x);
    if (in.x.size() == 0) return;
    with_element(in.x.dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int kWide = 16 / static_cast<int>(sizeof(T));
        Rotation<T> p;
        p.x = static_cast<const T*>(in.x.data);
        p.out = static_cast<T*>(outputs.out.data);
        p.cos = static_cast<const float*>(in.cos.data);
        p.sin = static_cast<const float*>(in.sin.data);
        if (in.positions) p.positions = Indices(*in.positions);
        p.x_token = in.x.strides[0];
        p.x_head = in.x.strides[1];
        p.cos_row = in.cos.strides[0];
        p.sin_row = in.sin.strides[0];
        p.table_rows = in.cos.shape[0];
        p.heads = static_cast<int>(in.x.shape[1]);
        p.channels = static_cast<int>(in.x.shape[2]);
        p.half = static_cast<int>(in.cos.shape[1]);
        p.pairs = static_cast<int>(std::max<int64_t>(1, kNumbers / p.channels));
        p.backwards = outputs.backwards;
        const Offsets offsets(in.offsets, in.x.shape[0]);
        const int64_t blocks = (offsets.tokens * p.heads + p.pairs - 1) / p.pairs;
        const bool wide = std::min(alignment_of(in.x), alignment_of(outputs.out)) == 16 && p.half % kWide == 0 &&
                          p.channels % kWide == 0;
        const auto kernel = in.interleaved ? (wide ? rotate_rows<T, kWide, true> : rotate_rows<T, 1, true>)
                                           : (wide ? rotate_rows<T, kWide, false> : rotate_rows<T, 1, false>);
        stream.launch(kernel, blocks, kThreads, 0, p, offsets);
    });
}

}  // namespace cuda
}  // namespace interformer
