#include "cuda/apply_rotary.h"

#include <algorithm>
#include <cstdint>

#include "cuda/elements.h"
#include "cuda/instructions.cuh"
#include "cuda/rows.cuh"

namespace interformer {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kNumbers = 8192;  // of a block

template <typename T>
struct Rotation {
    const T* x;
    T* out;
    const float *cos, *sin;
    Indices positions;  // none: the index in the row
    int64_t x_token, x_head, cos_row, sin_row, table_rows;
    int heads, channels, half;
    int units;  // (token, head) pairs of a block
    bool backwards;
};

// Numbers that are read and written at once.
template <typename T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Vector {
    T at[WIDTH];
};

// Turns WIDTH pairs of channels, from pair `c` on: (c, c + half), or (2 c, 2 c + 1) if interleaved.
template <typename T, int WIDTH, bool INTERLEAVED>
__device__ void turn(const Rotation<T>& p, const T* from, T* to, const float* cos, const float* sin, int c) {
    using V = Vector<T, WIDTH>;
    const int places[2] = {INTERLEAVED ? 2 * c : c, INTERLEAVED ? 2 * c + WIDTH : c + p.half};
    V in[2], out[2];
    for (int i = 0; i < 2; ++i) in[i] = *reinterpret_cast<const V*>(from + places[i]);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        // Of both vectors in a row, if interleaved the numbers 2 i and 2 i + 1, else the numbers i and i + WIDTH.
        const int a = INTERLEAVED ? 2 * i : i, b = INTERLEAVED ? 2 * i + 1 : i + WIDTH;
        const float x = widen(in[a / WIDTH].at[a % WIDTH]), y = widen(in[b / WIDTH].at[b % WIDTH]);
        const float u = cos[c + i], v = p.backwards ? -sin[c + i] : sin[c + i];
        out[a / WIDTH].at[a % WIDTH] = narrow<T>(x * u - y * v);
        out[b / WIDTH].at[b % WIDTH] = narrow<T>(y * u + x * v);
    }
    for (int i = 0; i < 2; ++i) *reinterpret_cast<V*>(to + places[i]) = out[i];
}

// Some (token, head) pairs of any rows, the first `2 half` channels turned; zero where no row holds the token.
template <typename T, int WIDTH, bool INTERLEAVED>
__global__ void __launch_bounds__(kThreads)
    rotate_rows(const __grid_constant__ Rotation<T> p, const __grid_constant__ Offsets offsets) {
    using V = Vector<T, WIDTH>;
    const int64_t begin = int64_t{blockIdx.x} * p.units, end = min(begin + p.units, offsets.tokens * p.heads);
    // Rows are short: those of the block's first and last token are near, and all others between them.
    const int64_t low = offsets.holder_of(begin / p.heads, 0, offsets.rows);
    const int64_t high = offsets.holder_of((end - 1) / p.heads, low, offsets.rows);
    // A unit is `half / WIDTH` turns, and as many vectors that pass as they are, bit by bit, as are left.
    const int turns = p.half / WIDTH, tasks = p.channels / WIDTH - turns;
    const int count = static_cast<int>(end - begin) * tasks;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const int64_t unit = begin + i / tasks;
        const int task = i % tasks;
        const int64_t token = unit / p.heads, head = unit % p.heads;
        const int64_t row = offsets.holder_of(token, low, high), n = token - offsets.edge(row);
        const T* from = p.x + token * p.x_token + head * p.x_head;
        T* to = p.out + unit * p.channels;
        if (row == offsets.rows || n < 0) {
            for (int part = task; part < p.channels / WIDTH; part += tasks)
                *reinterpret_cast<V*>(to + part * WIDTH) = V{};
        } else if (task < turns) {
            const int64_t wanted = p.positions.entries == nullptr ? n : p.positions[token];
            const int64_t place = min(max(wanted, int64_t{0}), p.table_rows - 1);
            turn<T, WIDTH, INTERLEAVED>(p, from, to, p.cos + place * p.cos_row, p.sin + place * p.sin_row,
                                        task * WIDTH);
        } else {
            const int passed = (task + turns) * WIDTH;
            *reinterpret_cast<V*>(to + passed) = *reinterpret_cast<const V*>(from + passed);
        }
    }
}

}  // namespace

void apply_rotary(const RotaryCall& call, const Stream& stream) {
    const Checks check = stream.checks();
    check_call(check, call);
    check.contiguous_last_axis("x", call.x);
    if (call.x.size() == 0) return;
    with_element(call.x.dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int kWide = 16 / static_cast<int>(sizeof(T));
        Rotation<T> p;
        p.x = static_cast<const T*>(call.x.data);
        p.out = static_cast<T*>(call.out.data);
        p.cos = static_cast<const float*>(call.cos.data);
        p.sin = static_cast<const float*>(call.sin.data);
        if (call.positions) p.positions = Indices(*call.positions);
        p.x_token = call.x.strides[0];
        p.x_head = call.x.strides[1];
        p.cos_row = call.cos.strides[0];
        p.sin_row = call.sin.strides[0];
        p.table_rows = call.cos.shape[0];
        p.heads = static_cast<int>(call.x.shape[1]);
        p.channels = static_cast<int>(call.x.shape[2]);
        p.half = static_cast<int>(call.cos.shape[1]);
        p.units = static_cast<int>(std::max<int64_t>(1, kNumbers / p.channels));
        p.backwards = call.backwards;
        const Offsets offsets(call.offsets, call.x.shape[0]);
        const int64_t blocks = (offsets.tokens * p.heads + p.units - 1) / p.units;
        const bool wide = std::min(alignment_of(call.x), alignment_of(call.out)) == 16 && p.half % kWide == 0 &&
                          p.channels % kWide == 0;
        const auto kernel = call.interleaved ? (wide ? rotate_rows<T, kWide, true> : rotate_rows<T, 1, true>)
                                             : (wide ? rotate_rows<T, kWide, false> : rotate_rows<T, 1, false>);
        stream.launch(kernel, blocks, kThreads, 0, p, offsets);
    });
}

}  // namespace cuda
}  // namespace interformer
