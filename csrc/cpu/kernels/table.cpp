// The kernels of one instruction set.
#include "cpu/kernels.h"

#include "cpu/kernels/attention_backward.h"
#include "cpu/kernels/attention_forward.h"
#include "cpu/kernels/personalized_ffn.h"
#include "cpu/kernels/rotary.h"

INTERFORMER_LEVEL_BEGIN

template <typename T>
constexpr Kernels kernels_of() {
    return {&AttentionForward<T>::memory,
            &AttentionBackward<T>::memory,
            &AttentionForward<T>::run,
            &AttentionBackward<T>::run,
            &AttentionBackward<T>::parts,
            &AttentionBackward<T>::sums_bytes,
            &AttentionBackward<T>::add_part,
            &Ffn<T>::memory,
            &Ffn<T>::forward,
            &Ffn<T>::backward,
            &Rotary<T>::memory,
            &Rotary<T>::run};
}

INTERFORMER_LEVEL_END

namespace interformer {
namespace INTERFORMER_LEVEL {

// In the order of DType.
extern const Kernels kKernels[];
const Kernels kKernels[] = {kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>(), kernels_of<Float16>()};

}  // namespace INTERFORMER_LEVEL
}  // namespace interformer
