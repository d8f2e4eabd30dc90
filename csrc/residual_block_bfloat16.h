// The refiner's residual block on the CPU with products in bfloat16: plain sums, float32 in the accumulators and along the
// skip connection. Both convolutions of an image, and all of its gradients, are taken while it is in a core's L2 cache.
// The numbers are the caller's: images [count, height, width, C], no torch.
#pragma once

#include <cstdint>

#include "residual_block_strips.h"

namespace fastsimgan::residual_block_bfloat16 {

using bfloat16 = uint16_t;  // its bits
using residual_block_strips::Images;
using residual_block_strips::kMaps;

// Weights [C, C, 3, 3] with any strides as the matrix unit takes them: images.weights() values. `backward` swaps inputs
// with outputs and turns the kernels by 180 degrees, as the gradient with respect to the input needs.
void pack_weights(const float* weight, const int64_t* strides, int64_t maps, bool backward, bfloat16* packed);

// For strips [from, to): hidden = relu(conv1(in)), out = relu(in + conv2(hidden)). `hidden` may be null.
void forward(const Images& images, int64_t from, int64_t to, const float* in, const bfloat16* weight1,
             const float* bias1, const bfloat16* weight2, const float* bias2, bfloat16* hidden, float* out);

// What backward adds up over strips, zero before the first: weights as [3, 3, C in, C out].
struct Sums {
  float *weight1, *bias1, *weight2, *bias2;
};

// For strips [from, to): the gradient of `in`, and what they add to the others', from that of `out`. The weights are
// those of pack_weights(backward).
void backward(const Images& images, int64_t from, int64_t to, const float* grad, const float* in,
              const bfloat16* hidden, const float* out, const bfloat16* weight1, const bfloat16* weight2,
              float* grad_in, Sums sums);

}  // namespace fastsimgan::residual_block_bfloat16
