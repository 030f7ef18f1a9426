#include "cpu/apply_rotary.h"

#include "common/checks.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/level.h"
#include "cpu/parallel.h"
#include "cpu/rotary_tables.h"
#include "cpu/rows.h"

namespace interformer {

void apply_rotary(const TensorView& x, const TensorView& offsets, const TensorView& cos, const TensorView& sin,
                  const std::optional<TensorView>& positions, bool interleaved, bool backwards, const TensorView& out,
                  int64_t threads) {
    const Checks check("apply_rotary");
    check.floating("x", x);
    check.tensor("x", x, x.dtype, {{"T"}, {"H"}, {"D"}});
    check.index("offsets", offsets);
    if (offsets.shape[0] < 1) check.refuse("offsets", "[B+1] with at least one entry", describe(offsets));
    check.gradient("out", out, "x", x);
    check_rotary(check, cos, sin, x.shape[2]);
    check_positions(check, "positions", positions, x.shape[0]);

    const Rows rows(offsets, x.shape[0]);
    RotaryProblem p;
    p.heads = x.shape[1];
    p.head_size = x.shape[2];
    p.begins = rows.begins();
    p.counts = rows.counts();
    p.x = {x.data, rows.begins(), 0, x.strides[0], x.strides[1], x.strides[2], true};
    p.out = {out.data, rows.begins(), 0, out.strides[0], out.strides[1], out.strides[2], true};
    p.rope = rotary_tables(cos, sin, interleaved);
    p.positions = positions_of(positions);
    p.backwards = backwards;
    want_huge_pages(out);
    zero_gaps(rows, out);
    const Kernels& native = kernels(x.dtype);
    const Runs runs(rows.count(), kMostRuns, [&](int64_t row) { return static_cast<double>(1 + rows.counts()[row]); });
    const int active = worthwhile_threads(rows.ordered() ? threads : 1, runs.count(), 4 * x.size());
    ThreadMemory memory(active, native.rotary_memory(p));
    parallel_for(active, runs.count(), [&](int64_t i, int thread) {
        const int64_t run = runs.in_order(i);
        native.rotary(p, runs.cut(run), runs.cut(run + 1), memory.of(thread));
    });
}

}  // namespace interformer
