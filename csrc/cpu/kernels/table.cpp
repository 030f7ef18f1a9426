// The kernels of one instruction set.
#include "cpu/kernel_table.h"

#include "cpu/kernels/attention_backward.h"
#include "cpu/kernels/attention_forward.h"
#include "cpu/kernels/folded_pooling.h"
#include "cpu/kernels/jagged_softmax.h"
#include "cpu/kernels/jagged_weighted_sum.h"
#include "cpu/kernels/personalized_ffn.h"
#include "cpu/kernels/rotary.h"

INTERFORMER_ISA_BEGIN

template <typename T>
constexpr Kernels kernels_of() {
    return {&AttentionForward<T>::memory,
            &AttentionBackward<T>::memory,
            &AttentionForward<T>::run,
            &AttentionBackward<T>::run,
            &AttentionBackward<T>::shards,
            &AttentionBackward<T>::key_grads_bytes,
            &AttentionBackward<T>::add_shard,
            &FoldedWeights<T>::memory,
            &FoldedWeights<T>::prepare,
            &FoldedPooling<T>::memory,
            &FoldedPooling<T>::run,
            &Ffn<T>::memory,
            &Ffn<T>::forward,
            &Ffn<T>::backward,
            &Rotary<T>::memory,
            &Rotary<T>::run,
            &Softmax<T>::memory,
            &Softmax<T>::forward,
            &Softmax<T>::backward,
            &WeightedSum<T>::memory,
            &WeightedSum<T>::forward,
            &WeightedSum<T>::backward};
}

INTERFORMER_ISA_END

namespace interformer {
namespace INTERFORMER_ISA {

// In the order of DType.
extern const Kernels kKernels[];
const Kernels kKernels[] = {kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>(), kernels_of<Float16>()};

}  // namespace INTERFORMER_ISA
}  // namespace interformer
