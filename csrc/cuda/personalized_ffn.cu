#include "cuda/personalized_ffn.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/elements.h"
#include "cuda/maps.cuh"
#include "cuda/rows.cuh"
#include "cuda/tile_copy.cuh"

namespace interformer {
namespace cuda {

namespace {

constexpr int kThreads = 128;
// Blocks of a multiprocessor, at least: without a bound the compiler keeps to 64 registers, and spills.
constexpr int kBlocks = 4;
constexpr int kTokens = 32;   // tokens of a block, and of a step of a sum over tokens
constexpr int kColumns = 64;  // columns of a block
constexpr int kStep = 32;     // channels of a step of a sum over channels

// A matrix for each row, or the tokens of all rows. `row` and `line` are the strides of rows and of lines.
template <typename T>
struct Matrix {
    T* data = nullptr;
    int64_t row = 0, line = 0;
    int alignment = 16;

    __device__ T* at(int64_t r, int64_t i) const { return data + r * row + i * line; }
    // The lines of a row, from column `first` on.
    __device__ auto lines(int64_t r, int first, int columns) const {
        return RowSource<std::remove_const_t<T>>{at(r, 0) + first, line, columns, alignment};
    }
};

template <typename T>
Matrix<T> tokens_of(const TensorView& x) {
    return {static_cast<T*>(x.data), 0, x.strides[0], copy_alignment(x, 0)};
}
template <typename T>
Matrix<T> matrices_of(const TensorView& x) {
    return {static_cast<T*>(x.data), x.strides[0], x.strides[1], copy_alignment(x, 1)};
}
template <typename T>
Matrix<T> vectors_of(const TensorView& x) {
    return {static_cast<T*>(x.data), x.strides[0], 0, alignment_of(x)};
}

int64_t ceil_div(int64_t size, int64_t block) {
    return (size + block - 1) / block;
}

// ---------------------------------------------------------------- tokens times their row's matrix

template <typename T>
struct Product {
    Matrix<const T> x, weight;
    Matrix<const T> bias, residual, grad_out;  // null: none
    T* out;
    int inner, columns;  // length of the sum, and columns of the product
    Activation activation;
};

// A tile of a matrix: its lines are places of the sum, or columns if it is transposed.
template <typename T, bool TRANSPOSED>
using Lines = std::conditional_t<TRANSPOSED, Tile<T, kColumns, kStep>, Tile<T, kStep, kColumns>>;

constexpr int kStaged = kColumns + 4;  // stride of the staged tile, padded against bank conflicts

template <typename T, bool TRANSPOSED>
constexpr int kProductMemory =
    std::max(2 * (Tile<T, kTokens, kStep>::kBytes + Lines<T, TRANSPOSED>::kBytes), kTokens * kStaged * 4);
static_assert(kProductMemory<float, false> <= kMaxSharedMemory && kProductMemory<float, true> <= kMaxSharedMemory);

// The output of a sum: act(sum + bias) + residual; or, given the output's gradient, the gradient of the sum.
template <typename T>
__device__ float epilogue(const Product<T>& p, float sum, int64_t row, int64_t token, int column) {
    if (p.bias.data != nullptr) sum += widen(p.bias.at(row, 0)[column]);
    if (p.grad_out.data != nullptr) return widen(p.grad_out.at(0, token)[column]) * activation_grad(sum, p.activation);
    const float y = activate(sum, p.activation);
    return p.residual.data == nullptr ? y : y + widen(p.residual.at(0, token)[column]);
}

// Calls `each(token, column, sum)` for the block's results by way of shared memory, line by line. Neighbours in a line
// go to neighbours in a warp, and the code of `each` is there once, not once for each number of a lane.
template <typename Each>
__device__ void for_each_result(AccTile (&acc)[2], int line, int side, Each&& each) {
    float* staged = reinterpret_cast<float*>(shared_memory());
#pragma unroll
    for (int n = 0; n < 2; ++n)
        acc[n].for_each([&](int i, int j, float sum) { staged[(line + i) * kStaged + side + n * 16 + j] = sum; });
    __syncthreads();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kTokens * kColumns; i += kThreads)
        each(i / kColumns, i % kColumns, staged[i / kColumns * kStaged + i % kColumns]);
}

// 32 tokens of one row by 64 columns; TRANSPOSED multiplies by the transposed matrix. Zero on the tail.
template <typename T, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, kBlocks)
    row_products(const __grid_constant__ Product<T> p, const __grid_constant__ Offsets offsets) {
    const int blocks = (p.columns + kColumns - 1) / kColumns;
    const int first = static_cast<int>(blockIdx.x % blocks) * kColumns;
    const Slot slot = offsets.find(blockIdx.x / blocks, 1, kTokens);
    const int64_t row = slot.span.row, token = slot.span.first + slot.begin;
    const int count = static_cast<int>(min(int64_t{slot.span.count} - slot.begin, int64_t{kTokens}));
    if (count <= 0) return;

    SharedMemory shared;
    const auto x = shared.stages<Tile<T, kTokens, kStep>, 2>();
    const auto weight = shared.stages<Lines<T, TRANSPOSED>, 2>();
    const auto start = [&](int k, int i) {
        const int wide = min(p.inner - k, kStep);
        cp_async_tile(x[i], p.x.lines(0, k, wide), block_threads(), token, count);
        if constexpr (TRANSPOSED)
            cp_async_tile(weight[i], p.weight.lines(row, k, wide), block_threads(), first, p.columns - first);
        else
            cp_async_tile(weight[i], p.weight.lines(row, first, p.columns - first), block_threads(), k, wide);
        cp_async_commit();
    };

    // The four warps are two by two: each has 16 tokens and 32 columns.
    const int warp = static_cast<int>(threadIdx.x) / kWarp, line = warp / 2 * 16, side = warp % 2 * 32;
    AccTile acc[2];
    const bool in_row = row < offsets.rows;
    const int steps = in_row ? (p.inner + kStep - 1) / kStep : 0;
    if (steps > 0) start(0, 0);
    for (int i = 0; i < steps; ++i) {
        if (i + 1 < steps) {
            start((i + 1) * kStep, (i + 1) % 2);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kStep; k += 16) {
            LeftOperand<T> left;
            load_left(left, x[i % 2], line, k);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                RightOperand<T> right;
                if constexpr (TRANSPOSED)
                    load_right_transposed(right, weight[i % 2], k, side + n * 16);
                else
                    load_right(right, weight[i % 2], k, side + n * 16);
                mma(acc[n], left, right);
            }
        }
        __syncthreads();
    }
    for_each_result(acc, line, side, [&](int t, int column, float sum) {
        if (t >= count || first + column >= p.columns) return;
        const float y = in_row ? epilogue(p, sum, row, token + t, first + column) : 0.0f;
        p.out[(token + t) * p.columns + first + column] = narrow<T>(y);
    });
}

template <typename T, bool TRANSPOSED>
void start_products(const Product<T>& p, const Offsets& offsets, const Stream& stream) {
    const int64_t blocks = slots(offsets.tokens, offsets.rows, 1, kTokens) * ceil_div(p.columns, kColumns);
    if (offsets.tokens > 0)
        stream.launch(row_products<T, TRANSPOSED>, blocks, kThreads, kProductMemory<T, TRANSPOSED>, p, offsets);
}

// ---------------------------------------------------------------- gradients of the matrices

template <typename T>
struct WeightGradient {
    Matrix<const T> x, grad;
    T *grad_weight, *grad_bias;  // contiguous; `grad_bias` null: no bias
    int inner, columns;
    int split_tokens;  // rows of more tokens are split
    float* partials;   // for each split the sums of a matrix, then those of a bias

    __device__ int64_t numbers() const { return int64_t{inner} * columns; }
    __host__ __device__ int64_t partial_size() const {
        return int64_t{inner} * columns + (grad_bias == nullptr ? 0 : columns);
    }
};

template <typename T>
constexpr int kGradientMemory = 4 * Tile<T, kTokens, kColumns>::kBytes;
static_assert(kGradientMemory<float> <= kMaxSharedMemory);

// 64 x 64 numbers of x' grad of one row, summed in order over its tokens, or one split of them; and 64 sums of grad.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    row_weight_gradients(const __grid_constant__ WeightGradient<T> p, const __grid_constant__ Offsets offsets) {
    using Tokens = Tile<T, kTokens, kColumns>;
    const int across = (p.columns + kColumns - 1) / kColumns, down = max((p.inner + kColumns - 1) / kColumns, 1);
    const Slot slot = offsets.find(blockIdx.x / (across * down), 1, p.split_tokens);
    const Span row = slot.span;
    // A row without tokens has a first split, too, which writes its zeros.
    if (row.row >= offsets.rows || slot.begin >= max(row.count, 1)) return;
    const int64_t first = row.first + slot.begin;
    const int tokens = min(row.count - static_cast<int>(slot.begin), p.split_tokens);
    const int tile = static_cast<int>(blockIdx.x % (across * down));
    const int e = tile / across * kColumns, f = tile % across * kColumns;

    SharedMemory shared;
    const auto x = shared.stages<Tokens, 2>(), grad = shared.stages<Tokens, 2>();
    const auto start = [&](int t, int i) {
        cp_async_tile(x[i], p.x.lines(0, e, p.inner - e), block_threads(), first + t, tokens - t);
        cp_async_tile(grad[i], p.grad.lines(0, f, p.columns - f), block_threads(), first + t, tokens - t);
        cp_async_commit();
    };

    // The four warps are one below the other: each has 16 lines of the matrix, and 64 columns.
    const int line = static_cast<int>(threadIdx.x) / kWarp * 16;
    AccTile acc[4];
    float bias_sum = 0.0f;  // for this thread's column
    const int steps = (tokens + kTokens - 1) / kTokens;
    if (steps > 0) start(0, 0);
    for (int i = 0; i < steps; ++i) {
        if (i + 1 < steps) {
            start((i + 1) * kTokens, (i + 1) % 2);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kTokens; k += 16) {
            LeftOperand<T> left;
            load_left_transposed(left, x[i % 2], line, k);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                RightOperand<T> right;
                load_right(right, grad[i % 2], k, n * 16);
                mma(acc[n], left, right);
            }
        }
        if (threadIdx.x < kColumns) {
            float step_sum = 0.0f;  // sums of sums: a large sum is rounded less often
            for (int t = 0; t < kTokens; ++t) step_sum += widen(*grad[i % 2].at(t, static_cast<int>(threadIdx.x)));
            bias_sum += step_sum;
        }
        __syncthreads();
    }
    float* partial = nullptr;
    if (row.count > p.split_tokens)
        partial = p.partials + partial_index(row.first, slot.begin / p.split_tokens, p.split_tokens) * p.partial_size();
    const auto write = [&](T* to, int64_t at, int64_t in_partial, float sum) {
        if (partial != nullptr)
            partial[in_partial] = sum;
        else
            to[at] = narrow<T>(sum);
    };
#pragma unroll
    for (int n = 0; n < 4; ++n)
        acc[n].for_each([&](int i, int j, float sum) {
            const int inside = e + line + i, column = f + n * 16 + j;
            const int64_t at = int64_t{inside} * p.columns + column;
            if (inside < p.inner && column < p.columns) write(p.grad_weight, row.row * p.numbers() + at, at, sum);
        });
    const int column = f + static_cast<int>(threadIdx.x);
    if (p.grad_bias != nullptr && e == 0 && threadIdx.x < kColumns && column < p.columns)
        write(p.grad_bias, row.row * p.columns + column, p.numbers() + column, bias_sum);
}

// Combines the partials of split rows, one number for each thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_partials(const __grid_constant__ WeightGradient<T> p, const __grid_constant__ Offsets offsets) {
    const int64_t blocks = (p.partial_size() + kThreads - 1) / kThreads;
    const int64_t i = blockIdx.x % blocks * kThreads + threadIdx.x;
    const Span row = split_row_at(offsets, blockIdx.x / blocks * p.split_tokens, p.split_tokens, 0);
    if (row.count == 0 || i >= p.partial_size()) return;
    const float* first = p.partials + partial_index(row.first, 0, p.split_tokens) * p.partial_size();
    float sum = 0.0f;
    for (int split = 0; split * int64_t{p.split_tokens} < row.count; ++split)
        sum += first[split * p.partial_size() + i];
    if (i < p.numbers())
        p.grad_weight[row.row * p.numbers() + i] = narrow<T>(sum);
    else
        p.grad_bias[row.row * p.columns + i - p.numbers()] = narrow<T>(sum);
}

template <typename T>
void start_weight_gradients(const WeightGradient<T>& p, const Offsets& offsets, const Stream& stream) {
    const int64_t tiles = std::max<int64_t>(ceil_div(p.inner, kColumns), 1) * ceil_div(p.columns, kColumns);
    stream.launch(row_weight_gradients<T>, slots(offsets.tokens, offsets.rows, 1, p.split_tokens) * tiles, kThreads,
                  kGradientMemory<T>, p, offsets);
    if (p.partials == nullptr) return;
    const int64_t rows = offsets.tokens / p.split_tokens + 1;  // at most one split row for so many tokens
    stream.launch(combine_partials<T>, rows * ceil_div(p.partial_size(), kThreads), kThreads, 0, p, offsets);
}

// ---------------------------------------------------------------- calls

void check_lines(const Checks& check, const FfnInputs& in) {
    check.contiguous_last_axis("x", in.x);
    check.contiguous_last_axis("weight", in.weight);
    if (in.bias) check.contiguous_last_axis("bias", *in.bias);
}

void check_workspace(const Checks& check, const FfnInputs& in, const FfnGradients& grads,
                     const FfnWorkspace& workspace) {
    const std::optional<TensorView>&grad = workspace.grad_pre_activation, &partials = workspace.partials;
    if (grad.has_value() != (in.activation != Activation::identity))
        check.refuse("grad_pre_activation", grad ? "None" : "given", grad ? describe(*grad) : "None");
    if (grad) check.gradient("grad_pre_activation", *grad, "grad_out", grads.grad_out);
    const int64_t tokens = in.x.shape[0], *size = in.weight.shape, split_tokens = workspace.split_tokens;
    if (split_tokens < kTokens || split_tokens % kTokens != 0)
        check.refuse("split_tokens", "a multiple of " + std::to_string(kTokens), std::to_string(split_tokens));
    const bool is_split = tokens > split_tokens;
    if (partials.has_value() != is_split)
        check.refuse("partials", is_split ? "given" : "None", partials ? describe(*partials) : "None");
    if (!is_split) return;
    const Axis room{"P", 2 * tokens / split_tokens + 1},
        numbers{"E F + F", size[1] * size[2] + (in.bias ? size[2] : 0)};
    check.tensor("partials", *partials, DType::float32, {room, numbers});
    check.contiguous("partials", *partials);
}

// The product of x and the weights, without an epilogue.
template <typename T>
Product<T> product_of(const FfnInputs& in, const TensorView& out) {
    Product<T> p{};
    p.x = tokens_of<const T>(in.x);
    p.weight = matrices_of<const T>(in.weight);
    if (in.bias) p.bias = vectors_of<const T>(*in.bias);
    p.out = static_cast<T*>(out.data);
    p.inner = static_cast<int>(in.weight.shape[1]);
    p.columns = static_cast<int>(in.weight.shape[2]);
    p.activation = in.activation;
    return p;
}

}  // namespace

void personalized_ffn_forward(const FfnInputs& in, const FfnOutputs& to, bool tf32, const Stream& stream) {
    const Checks check = stream.checks();
    check_forward(check, in, to);
    check_lines(check, in);
    if (to.residual) check.contiguous_last_axis("residual", *to.residual);
    with_element(in.x.dtype, tf32, [&](auto element) {
        using T = decltype(element);
        Product<T> p = product_of<T>(in, to.out);
        if (to.residual) p.residual = tokens_of<const T>(*to.residual);
        start_products<T, false>(p, Offsets(in.offsets, in.x.shape[0]), stream);
    });
}

void personalized_ffn_backward(const FfnInputs& in, const FfnGradients& grads, const FfnWorkspace& workspace, bool tf32,
                               const Stream& stream) {
    const Checks check = stream.checks();
    check_backward(check, in, grads);
    check_lines(check, in);
    check.contiguous_last_axis("grad_out", grads.grad_out);
    check_workspace(check, in, grads, workspace);
    with_element(in.x.dtype, tf32, [&](auto element) {
        using T = decltype(element);
        const Offsets offsets(in.offsets, in.x.shape[0]);
        Matrix<const T> grad = tokens_of<const T>(grads.grad_out);
        if (workspace.grad_pre_activation) {
            Product<T> p = product_of<T>(in, *workspace.grad_pre_activation);
            p.grad_out = grad;
            start_products<T, false>(p, offsets, stream);
            grad = tokens_of<const T>(*workspace.grad_pre_activation);
        }
        Product<T> p = product_of<T>(in, grads.grad_x);
        p.x = grad;
        p.bias = {};
        p.activation = Activation::identity;
        std::swap(p.inner, p.columns);
        start_products<T, true>(p, offsets, stream);

        WeightGradient<T> w{};
        w.x = tokens_of<const T>(in.x);
        w.grad = grad;
        w.grad_weight = static_cast<T*>(grads.grad_weight.data);
        if (grads.grad_bias) w.grad_bias = static_cast<T*>(grads.grad_bias->data);
        w.inner = static_cast<int>(in.weight.shape[1]);
        w.columns = static_cast<int>(in.weight.shape[2]);
        w.split_tokens = static_cast<int>(workspace.split_tokens);
        if (workspace.partials) w.partials = static_cast<float*>(workspace.partials->data);
        start_weight_gradients<T>(w, offsets, stream);
    });
}

}  // namespace cuda
}  // namespace interformer
