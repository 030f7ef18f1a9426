#include "cpu/features.h"

namespace interformer {

std::vector<std::string> cpu_features() {
    std::vector<std::string> features;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    // The builtin takes literals only.
#define INTERFORMER_FEATURE(name) \
    if (__builtin_cpu_supports(name)) features.emplace_back(name)
    INTERFORMER_FEATURE("sse4.2");
    INTERFORMER_FEATURE("avx");
    INTERFORMER_FEATURE("avx2");
    INTERFORMER_FEATURE("fma");
    INTERFORMER_FEATURE("avx512f");
    INTERFORMER_FEATURE("avx512bw");
    INTERFORMER_FEATURE("avx512vl");
    INTERFORMER_FEATURE("avx512dq");
    INTERFORMER_FEATURE("avx512bf16");
#undef INTERFORMER_FEATURE
#elif defined(__aarch64__)
    features.emplace_back("neon");  // part of the base architecture
#endif
    return features;
}

}  // namespace interformer
