// residual_block_float32.h's kernels for AVX-512; this file alone is compiled for it.
#define FASTSIMGAN_LANES 16
#include "residual_block_float32_winograd.h"

const fastsimgan::Kernels fastsimgan::kAvx512 = fastsimgan::kTable;
