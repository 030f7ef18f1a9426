#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace interformer {

#define INTERFORMER_DECLARE_ISA(name) \
    namespace name {                  \
    extern const Kernels kKernels[];  \
    }
INTERFORMER_DECLARE_ISA(generic)
#ifdef INTERFORMER_HAS_WIDE
INTERFORMER_DECLARE_ISA(wide)
#endif
#ifdef INTERFORMER_HAS_AVX2
INTERFORMER_DECLARE_ISA(avx2)
#endif
#ifdef INTERFORMER_HAS_AVX512
INTERFORMER_DECLARE_ISA(avx512)
#endif
#ifdef INTERFORMER_HAS_AVX512_BF16
INTERFORMER_DECLARE_ISA(avx512_bf16)
#endif
#undef INTERFORMER_DECLARE_ISA

namespace {

bool always() {
    return true;
}

struct Isa {
    const char* name;
    bool (*runs)();
    const Kernels* kernels;      // in the order of DType
    bool (*is_fast)() = always;  // whether it is worth choosing where it runs
};

#if defined(__x86_64__)
bool runs_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool runs_avx512_bf16() {
    return runs_avx512() && __builtin_cpu_supports("avx512bf16");
}
// Products of pairs run at the rate of float32's multiply-adds on AMD's processors, and at a quarter of it on Intel's,
// where widened numbers are faster.
bool has_fast_pairs() {
    return __builtin_cpu_is("amd");
}
#endif

// The last one that runs, and is fast, is the best.
const Isa kIsas[] = {
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
    {"avx512_bf16", runs_avx512_bf16, avx512_bf16::kKernels, has_fast_pairs},
#endif
};

const Isa& choose() {
    const char* forced = std::getenv("INTERFORMER_CPU_LEVEL");
    const Isa* best = nullptr;
    std::string names;
    for (const Isa& isa : kIsas) {
        if (!isa.runs()) continue;
        names += (names.empty() ? "" : ", ") + std::string(isa.name);
        if (isa.is_fast()) best = &isa;
        if (forced && isa.name == std::string(forced)) return isa;
    }
    if (forced && *forced)
        throw std::invalid_argument("INTERFORMER_CPU_LEVEL must be one of " + names + ", found " + forced);
    return *best;
}

const Isa& chosen() {
    static const Isa& isa = choose();
    return isa;
}

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas)
        if (isa.runs()) names.emplace_back(isa.name);
    return names;
}

const std::string& chosen_isa() {
    static const std::string name = chosen().name;
    return name;
}

const Kernels& kernels(DType dtype) {
    return chosen().kernels[static_cast<int>(dtype)];
}

}  // namespace interformer
