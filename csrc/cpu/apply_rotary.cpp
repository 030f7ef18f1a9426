#include "cpu/apply_rotary.h"

#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/rotary_tables.h"
#include "cpu/row_tasks.h"

namespace interformer {

void apply_rotary(const RotaryInputs& in, const RotaryOutputs& outputs, int64_t threads) {
    check_call(Checks("apply_rotary"), in, outputs);
    const TensorView &x = in.x, &out = outputs.out;
    const Rows rows(in.offsets, x.shape[0]);
    RotaryProblem p;
    p.heads = x.shape[1];
    p.head_size = x.shape[2];
    p.begins = rows.begins();
    p.counts = rows.counts();
    p.x = {x.data, rows.begins(), 0, x.strides[0], x.strides[1], x.strides[2], true};
    p.out = {out.data, rows.begins(), 0, out.strides[0], out.strides[1], out.strides[2], true};
    p.rope = rotary_tables(in.cos, in.sin, in.interleaved);
    p.positions = positions_of(in.positions);
    p.backwards = outputs.backwards;
    advise_huge_pages(out);
    zero_gaps(rows, out);
    const Kernels& native = kernels(x.dtype);
    for_row_groups(rows, threads, 4 * p.heads * p.head_size, native.rotary_memory(p),
                   [&](int64_t first, int64_t last, void* memory) { native.rotary(p, first, last, memory); });
}

}  // namespace interformer
