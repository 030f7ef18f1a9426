#include "cuda/tile_scheduler.cuh"

#include <algorithm>

#include "cuda/instructions.cuh"

namespace interformer {
namespace cuda {

namespace {

constexpr int64_t kLong = 4;  // a long row has more than this times the mean length

// One thread for each probe; the first probe in a long row counts the row's tiles.
__global__ void __launch_bounds__(kProbes)
    list_long_rows(const __grid_constant__ TileScheduler scheduler, const __grid_constant__ Offsets offsets,
                   int64_t per_token, int64_t block) {
    const int probe = static_cast<int>(threadIdx.x);
    if (probe == 0) *scheduler.claimed = 0;
    if (scheduler.long_tiles == nullptr) return;
    int64_t* tiles = reinterpret_cast<int64_t*>(shared_memory());
    const int64_t token = probe * scheduler.step;
    int64_t here = 0, before = 0;
    if (token < offsets.tokens) {
        const Span row = offsets.row_at(token);
        if (scheduler.is_long(offsets, row) && token - scheduler.step < row.first)
            here = (row.count * per_token + block - 1) / block;
    }
    tiles[probe] = here;
    __syncthreads();
    for (int i = 0; i < probe; ++i) before += tiles[i];
    scheduler.long_tiles[probe] = before;
    if (probe == kProbes - 1) scheduler.long_tiles[kProbes] = before + here;
}

}  // namespace

TileScheduler start_scheduler(const TensorView& memory, const TiledRows& rows, int64_t block, const Stream& stream) {
    int64_t* numbers = static_cast<int64_t*>(memory.data);
    const Offsets& offsets = rows.offsets;
    TileScheduler scheduler{reinterpret_cast<unsigned long long*>(numbers), rows.long_first ? numbers + 1 : nullptr, 0};
    const int64_t long_row = kLong * offsets.tokens / std::max<int64_t>(offsets.rows, 1);
    scheduler.step = std::max(offsets.tokens / kProbes + 1, long_row);
    stream.launch(list_long_rows, 1, kProbes, kProbes * static_cast<int>(sizeof(int64_t)), scheduler, offsets,
                  rows.per_token, block);
    return scheduler;
}

}  // namespace cuda
}  // namespace interformer
