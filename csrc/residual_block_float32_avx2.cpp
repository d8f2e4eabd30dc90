// residual_block_float32.h's kernels for AVX2 and FMA; this file alone is compiled for them.
#define FASTSIMGAN_LANES 8
#include "residual_block_float32_winograd.h"

const fastsimgan::Kernels fastsimgan::kAvx2 = fastsimgan::kTable;
