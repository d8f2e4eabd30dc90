// The refiner's residual block on the CPU, in float32: 3x3 convolutions of C to C maps by the minimal filtering algorithm
// F(4x4, 3x3) of Winograd (Lavin & Gray, "Fast algorithms for convolutional neural networks", CVPR 2016), which spends
// 36 products where the sum itself takes 144. The numbers are the caller's: images [count, height, width, C], no torch.
#pragma once

#include <cstdint>

#include "always_inline.h"

namespace fastsimgan::residual_block_float32 {

constexpr int64_t kMostMaps = 1024;

// What a pass works on. `maps` is C, a multiple of 8, at most kMostMaps.
struct Features {
  int64_t count, height, width, maps;
  FASTSIMGAN_ALWAYS_INLINE int64_t rows() const { return (height + 3) / 4; }  // of 4x4 tiles
  FASTSIMGAN_ALWAYS_INLINE int64_t columns() const { return (width + 3) / 4; }
  FASTSIMGAN_ALWAYS_INLINE int64_t tiles() const { return count * rows() * columns(); }
  FASTSIMGAN_ALWAYS_INLINE int64_t numel() const { return count * height * width * maps; }
  // Tiles that are transformed before they are multiplied: as many as keep both in a core's L2 cache, whole sixes.
  FASTSIMGAN_ALWAYS_INLINE int64_t strip() const {
    const int64_t fits = 409600 / (36 * 4 * maps);
    return fits < 6 ? 6 : fits > 54 ? 54 : fits / 6 * 6;
  }
  FASTSIMGAN_ALWAYS_INLINE int64_t strips() const { return (tiles() + strip() - 1) / strip(); }
  // floats of a strip of transformed tiles
  FASTSIMGAN_ALWAYS_INLINE int64_t transformed() const { return 36 * strip() * maps; }
};

// For one kind of vectors.
struct Kernels {
  int64_t lanes;  // that C must be a multiple of

  // Weights [C, C, 3, 3] with any strides, transformed for `convolve`: 36 * C * C floats. `backward` swaps inputs with
  // outputs and turns the kernels by 180 degrees, as the gradient with respect to the input needs.
  void (*transform_weights)(const float* weight, const int64_t* strides, int64_t maps, bool backward,
                            float* transformed);

  // For the tiles of strips [from, to): out = f(conv(in) + bias + add), where f = relu, or zeroes what `positive` does
  // not exceed 0 in, or the identity. `bias` [C], `add` and `positive` like `out`; each may be null.
  // `scratch`: 2 * features.transformed() floats.
  void (*convolve)(const Features& features, int64_t from, int64_t to, const float* in, const float* weights,
                   const float* bias, const float* add, const float* positive, bool relu, float* out, float* scratch);

  // Adds to `gradient` (36 * C * C floats, as transformed) what the tiles of strips [from, to) give for the weights:
  // `in` is what was convolved, `grad` the gradient of the outcome. `scratch`: 2 * features.transformed() floats.
  void (*weight_gradient)(const Features& features, int64_t from, int64_t to, const float* in, const float* grad,
                          float* gradient, float* scratch);

  // The gradient of the weights themselves, contiguous [C, C, 3, 3], from the transformed one; what is within rounding
  // of 0 (2.5e-7 of the kernel's largest transformed value) is 0.
  void (*transform_back)(const float* gradient, int64_t maps, float* weight_gradient);

  // masked = grad where out > 0, else 0, over `pixels` pixels of C values; adds their sums to `sums` [C] (null: no
  // sums). `masked` may be `grad` itself; `out` null takes all.
  void (*mask_and_sum)(const float* grad, const float* out, int64_t pixels, int64_t maps, float* masked, float* sums);
};

extern const Kernels kAvx2;    // with FMA
extern const Kernels kAvx512;

}  // namespace fastsimgan::residual_block_float32
