// residual_block_float32.h's kernels for AVX2 and FMA; this file alone is compiled for them.
#define FASTSIMGAN_LANES 8
#include "residual_block_float32_winograd.h"

namespace fastsimgan::residual_block_float32 {

const Kernels kAvx2 = kTable;

}  // namespace fastsimgan::residual_block_float32
