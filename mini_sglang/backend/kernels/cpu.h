// What this machine's CPU offers: the variant for it, and which cache it does well to fetch into.

#pragma once

#include "kernels.h"

#include <string.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

// Null where the library has not the one that is wanted, or this CPU cannot run it; an empty name takes the best.
const Variant* find_variant(const char* wanted) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool vnni = avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    const struct {
        const Variant* variant;
        bool supported;
    } choices[] = {{&avx512bf16_variant, bf16},
                   {&avx512vnni_variant, vnni},
                   {&avx2_variant, avx2},
                   {&generic_variant, true}};
    for (const auto& choice : choices) {
        if (!choice.supported || !choice.variant) continue;
        if (!*wanted || !strcmp(wanted, choice.variant->name)) return choice.variant;
    }
    return nullptr;
#else
    return !*wanted || !strcmp(wanted, generic_variant.name) ? &generic_variant : nullptr;
#endif
}

// Whether what comes next is fetched into the second-level cache. A first one of 32 KB does not keep it, and waits for
// too many misses at a time: on Zen 4 four rows of Q4_1 would take 1.3 times as long, decodes of int8 KV 1.5 times. On
// Zen 5, which has 48 KB, attention came slower from the second.
bool fetches_far() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    return bytes > 0 && bytes < 48 << 10;
#else
    return false;
#endif
}

}  // namespace
