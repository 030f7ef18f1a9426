#include "cuda/queue.cuh"

#include <algorithm>

#include "cuda/instructions.cuh"

namespace interformer {
namespace cuda {

namespace {

constexpr int64_t kLong = 4;  // times the mean length is long

// A thread for each mark, of which the first one in a long row stands for the row.
__global__ void __launch_bounds__(kMarks)
    list_long_rows(const __grid_constant__ Queue queue, const __grid_constant__ Offsets offsets, int64_t units,
                   int64_t block) {
    const int mark = static_cast<int>(threadIdx.x);
    if (mark == 0) *queue.taken = 0;
    if (queue.listed == nullptr) return;
    int64_t* tiles = reinterpret_cast<int64_t*>(shared_memory());
    const int64_t token = mark * queue.step;
    int64_t own = 0, before = 0;
    if (token < offsets.tokens) {
        const Span row = offsets.holder(token);
        if (queue.is_long(offsets, row) && token - queue.step < row.first)
            own = (row.count * units + block - 1) / block;
    }
    tiles[mark] = own;
    __syncthreads();
    for (int i = 0; i < mark; ++i) before += tiles[i];
    queue.listed[mark] = before;
    if (mark == kMarks - 1) queue.listed[kMarks] = before + own;
}

}  // namespace

Queue start_queue(const TensorView& memory, const Offsets& rows, bool long_first, int64_t units, int64_t block,
                  const Stream& stream) {
    int64_t* numbers = static_cast<int64_t*>(memory.data);
    Queue queue{reinterpret_cast<unsigned long long*>(numbers), long_first ? numbers + 1 : nullptr, 0};
    queue.step = std::max(rows.tokens / kMarks + 1, kLong * rows.tokens / std::max<int64_t>(rows.rows, 1));
    stream.launch(list_long_rows, 1, kMarks, kMarks * static_cast<int>(sizeof(int64_t)), queue, rows, units, block);
    return queue;
}

}  // namespace cuda
}  // namespace interformer
