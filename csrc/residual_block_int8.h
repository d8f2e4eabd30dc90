// The refiner's residual block on the CPU with products of 8 bits, on AMX or by AVX-512's VNNI: unsigned features, signed
// weights, exact 32-bit sums, float32 along the skip connection. Inference only. The numbers are the caller's: images
// [count, height, width, C], no torch.
#pragma once

#include <cstdint>

#include "residual_block_strips.h"

namespace fastsimgan::residual_block_int8 {

using residual_block_strips::Images;
using residual_block_strips::kMaps;

// In memory the three taps of a kernel's row lie side by side: 3 C bytes from a position on. They are taken as segments of
// 64 bytes, the length of a tile's row; where the last is half full, its other weights are zeros.
constexpr int64_t kSegment = 64, kTile = 16 * kSegment;  // bytes

FASTSIMGAN_ALWAYS_INLINE int64_t segments_of(int64_t maps) { return (3 * maps + kSegment - 1) / kSegment; }

// Bytes of the weights of kMaps output maps: [3, segments, 2 halves of the maps, 16 groups of inputs, 16 maps, 4 inputs].
FASTSIMGAN_ALWAYS_INLINE int64_t group_bytes(int64_t maps) { return 3 * segments_of(maps) * 2 * kTile; }

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
using Forward = void(const Images& images, int64_t from, int64_t to, const float* in, const float* in_scale,
                     const Layer& first, const Layer& second, float* out);
Forward forward_amx, forward_vnni;

}  // namespace fastsimgan::residual_block_int8
