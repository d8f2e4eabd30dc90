// The refiner's residual block on the CPU with products of 8 bits, on AMX or by AVX-512's VNNI: unsigned features, signed
// weights, exact 32-bit sums, float32 along the skip connection. Inference only. The numbers are the caller's: images
// [count, height, width, C], no torch.
#pragma once

#include <cstdint>

#include "residual_block_bfloat16.h"

namespace fastsimgan::int8 {

using amx::Images;
using amx::kMaps;

enum class Unit { kAmx, kVnni };  // what multiplies

// Bytes of a layer's packed weights.
int64_t packed_bytes(int64_t maps);

// Weights [C, C, 3, 3] with any strides as both units take them.
void pack_weights(const int8_t* weight, const int64_t* strides, int64_t maps, int8_t* packed);

// A layer: its output is scale[map] * (bias[map] + sum).
struct Layer {
  const int8_t* packed;
  const int32_t* bias;
  const float* scale;
};

// For strips [from, to), all roundings to even and to [0, 255]:
//   hidden = round(conv1(round(in * in_scale))), out = relu(in + conv2(hidden))
void forward(Unit unit, const Images& images, int64_t from, int64_t to, const float* in, const float* in_scale,
             const Layer& first, const Layer& second, float* out);

}  // namespace fastsimgan::int8
