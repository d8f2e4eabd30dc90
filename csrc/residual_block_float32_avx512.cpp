// residual_block_float32.h's kernels for AVX-512; this file alone is compiled for it.
#define FASTSIMGAN_LANES 16
#include "residual_block_float32_winograd.h"

namespace fastsimgan::residual_block_float32 {

const Kernels kAvx512 = kTable;

}  // namespace fastsimgan::residual_block_float32
