#include "cpu_features.h"

#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastsimgan::cpu_features {
namespace {

// CPUID's answers to leaf 7.
struct Features {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit Features(unsigned subleaf) {
    if (!__get_cpuid_count(7, subleaf, &a, &b, &c, &d)) a = b = c = d = 0;
  }
};

// Asks the system for the matrix unit's registers, once.
bool has_tiles() {
  static const bool answer = [] {
    if (!(Features(0).d >> 24 & 1)) return false;
#ifndef __linux__
    return false;
#else
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#endif
  }();
  return answer;
}

}  // namespace

bool has_avx2() {
  static const bool answer = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return answer;
}

bool has_avx512() {
  static const bool answer = [] {
    const unsigned b = Features(0).b;
    const bool there = (b >> 16 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
    return there && __builtin_cpu_supports("avx512f");  // and the system saves its registers
  }();
  return answer;
}

bool has_amx_bfloat16() {
  return has_avx512() && (Features(1).a >> 5 & 1) && (Features(0).d >> 22 & 1) && has_tiles();
}
bool has_amx_int8() { return has_avx512() && (Features(0).d >> 25 & 1) && has_tiles(); }
bool has_vnni() { return has_avx512() && (Features(0).c >> 11 & 1); }

}  // namespace fastsimgan::cpu_features
