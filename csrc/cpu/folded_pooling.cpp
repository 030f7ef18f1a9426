#include "cpu/folded_pooling.h"

#include <cmath>
#include <string>

#include "common/checks.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace interformer {

namespace {

void check_call(const Checks& check, const FoldedInputs& in, const FoldedOutputs& outputs) {
    const DType dtype = in.x.dtype;
    check.floating("x", in.x);
    check.tensor("x", in.x, dtype, {{"T"}, {"E"}});
    check.offsets("offsets", in.offsets);
    check.tensor("seeds", in.seeds, dtype, {{"M"}, {"H"}, {"D"}});
    const int64_t rows = in.offsets.shape[0] - 1, width = in.x.shape[1], *m = in.seeds.shape;
    if (width == 0) check.refuse("x", "of at least one channel", describe(in.x));
    check.tensor("key_weight", in.key_weight, dtype, {{"H D", m[1] * m[2]}, {"E", width}});
    check.tensor("value_weight", in.value_weight, dtype, {{"H D", m[1] * m[2]}, {"E", width}});
    if (in.value_bias) check.tensor("value_bias", *in.value_bias, dtype, {{"H D", m[1] * m[2]}});
    if (!std::isfinite(in.scale)) check.refuse("scale", "finite", std::to_string(in.scale));
    check.tensor("out", outputs.out, dtype, {{"B", rows}, {"M", m[0]}, {"H", m[1]}, {"D", m[2]}});
    check.contiguous("out", outputs.out);
    if (!outputs.pooled) return;
    check.tensor("pooled", *outputs.pooled, dtype, {{"B", rows}, {"M", m[0]}, {"H", m[1]}, {"E", width}});
    check.contiguous("pooled", *outputs.pooled);
}

RowTensor like_output(const TensorView& x) {
    return {x.data, nullptr, x.strides[0], x.strides[1], x.strides[2], x.strides[3], true};
}
RowTensor weight_of_heads(const TensorView& x, int64_t head_size) {
    return {x.data, nullptr, 0, x.strides[0], head_size * x.strides[0], x.strides[1], true};
}

FoldedProblem problem_of(const FoldedInputs& in, const FoldedOutputs& outputs, const Rows& rows) {
    FoldedProblem p;
    AttentionProblem& pooling = p.pooling;
    pooling.rows = rows.count();
    pooling.queries = pooling.max_queries = in.seeds.shape[0];
    pooling.heads = in.seeds.shape[1];
    pooling.kv_heads = 1;
    pooling.head_size = pooling.value_size = in.x.shape[1];
    pooling.key_begins = rows.begins();
    pooling.key_counts = rows.counts();
    pooling.max_keys = rows.longest();
    pooling.k = pooling.v = {in.x.data, rows.begins(), 0, in.x.strides[0], 0, in.x.strides[1], true};
    pooling.v_is_k = true;
    pooling.variant.scale = in.scale;
    p.head_size = in.seeds.shape[2];
    p.seeds = {in.seeds.data, nullptr, 0, in.seeds.strides[0], in.seeds.strides[1], in.seeds.strides[2], true};
    p.key_weight = weight_of_heads(in.key_weight, p.head_size);
    p.value_weight = weight_of_heads(in.value_weight, p.head_size);
    if (in.value_bias) {
        const int64_t stride = in.value_bias->strides[0];
        p.value_bias = {in.value_bias->data, nullptr, 0, 0, p.head_size * stride, stride, true};
    }
    p.out = like_output(outputs.out);
    if (outputs.pooled) p.pooled = like_output(*outputs.pooled);
    return p;
}

}  // namespace

void folded_pooling_forward(const FoldedInputs& in, const FoldedOutputs& outputs, int64_t threads) {
    check_call(Checks("folded_pooling_forward"), in, outputs);
    const Rows rows(in.offsets, in.x.shape[0]);
    const FoldedProblem p = problem_of(in, outputs, rows);
    const int64_t units = p.pooling.queries * p.pooling.heads, width = p.pooling.head_size;
    if (units == 0) return;
    advise_huge_pages(outputs.out);
    if (outputs.pooled) advise_huge_pages(*outputs.pooled);
    // No sum runs over rows, so groups may follow from the number of threads. The work of a row in keys, of two
    // multiply-adds for each unit and channel: its projection, and what a row costs beside.
    constexpr int64_t kGroupsOfThread = 16;
    constexpr double kOverhead = 4;
    const double of_row = static_cast<double>(p.head_size) / 2 + kOverhead;
    const RowGroups groups(rows.count(), kGroupsOfThread * threads,
                           [&](int64_t row) { return static_cast<double>(rows.counts()[row]) + of_row; });
    const double multiply_adds = 2 * groups.total() * static_cast<double>(units * width);
    const int active = worthwhile_threads(threads, groups.count(), static_cast<int64_t>(multiply_adds));
    const Kernels& native = kernels(in.x.dtype);
    ThreadMemory shared(1, native.folded_shared_memory(p)), memory(active, native.folded_memory(p));
    void* const weights = shared.for_thread(0);
    native.folded_prepare(p, weights);
    parallel_for(active, groups.count(), [&](int64_t i, int thread) {
        const int64_t group = groups.scheduled(i);
        native.folded_forward(p, weights, groups.bound(group), groups.bound(group + 1), memory.for_thread(thread));
    });
}

}  // namespace interformer
