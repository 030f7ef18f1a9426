#include "cpu/level.h"

#include <cstdlib>
#include <stdexcept>

namespace interformer {

#define INTERFORMER_DECLARE_LEVEL(name) \
    namespace name {                    \
    extern const Kernels kKernels[];    \
    }
INTERFORMER_DECLARE_LEVEL(generic)
#ifdef INTERFORMER_HAS_WIDE
INTERFORMER_DECLARE_LEVEL(wide)
#endif
#ifdef INTERFORMER_HAS_AVX2
INTERFORMER_DECLARE_LEVEL(avx2)
#endif
#ifdef INTERFORMER_HAS_AVX512
INTERFORMER_DECLARE_LEVEL(avx512)
#endif
#ifdef INTERFORMER_HAS_AVX512_BF16
INTERFORMER_DECLARE_LEVEL(avx512_bf16)
#endif
#undef INTERFORMER_DECLARE_LEVEL

namespace {

struct Level {
    const char* name;
    bool (*runs)();
    const Kernels* kernels;  // in the order of DType
};

bool always() {
    return true;
}

#if defined(__x86_64__)
bool runs_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool runs_avx512_bf16() {
    return runs_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif

// The last one that runs is the best.
const Level kLevels[] = {
#ifdef INTERFORMER_HAS_WIDE
    {"wide", runs_avx2, wide::kKernels},
#endif
    {"generic", always, generic::kKernels},
#ifdef INTERFORMER_HAS_AVX2
    {"avx2", runs_avx2, avx2::kKernels},
#endif
#ifdef INTERFORMER_HAS_AVX512
    {"avx512", runs_avx512, avx512::kKernels},
#endif
#ifdef INTERFORMER_HAS_AVX512_BF16
    {"avx512_bf16", runs_avx512_bf16, avx512_bf16::kKernels},
#endif
};

const Level& choose() {
    const char* forced = std::getenv("INTERFORMER_CPU_LEVEL");
    const Level* best = nullptr;
    std::string names;
    for (const Level& level : kLevels) {
        if (!level.runs()) continue;
        names += (best ? ", " : "") + std::string(level.name);
        best = &level;
        if (forced && level.name == std::string(forced)) return level;
    }
    if (forced && *forced)
        throw std::invalid_argument("INTERFORMER_CPU_LEVEL must be one of " + names + ", found " + forced);
    return *best;
}

const Level& chosen() {
    static const Level& level = choose();
    return level;
}

}  // namespace

std::vector<std::string> usable_levels() {
    std::vector<std::string> names;
    for (const Level& level : kLevels)
        if (level.runs()) names.emplace_back(level.name);
    return names;
}

const std::string& chosen_level() {
    static const std::string name = chosen().name;
    return name;
}

const Kernels& kernels(DType dtype) {
    return chosen().kernels[static_cast<int>(dtype)];
}

}  // namespace interformer
