// What this processor can execute and the system lets this process use. Compiled for any processor.
#pragma once

namespace fastsimgan::cpu_features {

bool has_avx2();          // with FMA
bool has_avx512();        // F, BW and VL
bool has_amx_bfloat16();  // with AVX-512 for bfloat16
bool has_amx_int8();      // with AVX-512
bool has_vnni();          // of AVX-512

}  // namespace fastsimgan::cpu_features
