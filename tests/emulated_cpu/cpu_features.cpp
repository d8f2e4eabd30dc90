// In the place of csrc/cpu_features.cpp: the emulated processor has what EMULATED_CPU names, as "avx2 avx512 vnni amx". And
// for the tests: this thread's configuration of the matrix unit, and how many products it has computed.
#include "../../csrc/cpu_features.h"

#include <immintrin.h>

namespace fastsimgan::cpu_features {
namespace {

bool has(const char* set) {
  const char* all = getenv("EMULATED_CPU");
  for (const char* at = all; at && (at = strstr(at, set)); ++at)
    if ((at == all || at[-1] == ' ') && (at[strlen(set)] == ' ' || at[strlen(set)] == 0)) return true;
  return false;
}

}  // namespace

bool has_avx2() { return has("avx2"); }
bool has_avx512() { return has("avx512"); }
bool has_amx_bfloat16() { return has("avx512") && has("amx"); }
bool has_amx_int8() { return has("avx512") && has("amx"); }
bool has_vnni() { return has("avx512") && has("vnni"); }

}  // namespace fastsimgan::cpu_features

extern "C" __attribute__((visibility("default"))) void emulated_configure(const void* config) {
  _tile_loadconfig(config);
}
extern "C" __attribute__((visibility("default"))) void emulated_configuration(void* config) {
  _tile_storeconfig(config);
}
extern "C" __attribute__((visibility("default"))) int64_t emulated_products() { return emulated::matrix_products; }
