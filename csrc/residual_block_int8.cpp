// The op fastsimgan::residual_block_int8 on the CPU: checks, memory and threads; the arithmetic is in
// residual_block_int8_kernels.cpp, which no processor without AVX-512's VNNI may enter.
#include "residual_block_int8.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "processor.h"

namespace fastsimgan::int8 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool usable(bool amx) { return amx ? processor::has_amx_int8() && processor::has_vnni() : processor::has_vnni(); }

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// [count, C, height, width] whose memory is [count, height, width, C].
Images images_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float, "features must be [B, C, H, W], float32");
  const Images images{x.size(0), x.size(2), x.size(3), x.size(1)};
  STD_TORCH_CHECK(x.numel() > 0 && images.maps % kMaps == 0,
                  "features must not be empty and their number of maps a multiple of 32, got ", images.maps);
  const int64_t expected[4] = {images.height * images.width * images.maps, 1, images.width * images.maps, images.maps};
  for (int64_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(x.size(i) == 1 || x.stride(i) == expected[i], "features must be channels_last");
  return images;
}

void check_vector(const Images& images, const Tensor& values, ScalarType type) {
  STD_TORCH_CHECK(values.dim() == 1 && values.scalar_type() == type && values.size(0) == images.maps &&
                      values.stride(0) == 1,
                  "in_scale, scale1 and scale2 must be contiguous float32, bias1 and bias2 int32 [C] with C=",
                  images.maps);
}

// In a tensor, whose memory begins at a cache line: what is loaded of it are whole lines.
Tensor packed(const Images& images, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Char && weight.size(0) == images.maps &&
                      weight.size(1) == images.maps && weight.size(2) == 3 && weight.size(3) == 3,
                  "weights must be int8 [C, C, 3, 3] with C=", images.maps);
  Tensor result = torch::stable::new_empty(weight, {packed_bytes(images.maps)});
  const int64_t strides[4] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  pack_weights(read<int8_t>(weight), strides, images.maps, static_cast<int8_t*>(result.mutable_data_ptr()));
  return result;
}

Tensor residual_block_cpu(Tensor features, Tensor in_scale, Tensor weight1, Tensor bias1, Tensor scale1, Tensor weight2,
                          Tensor bias2, Tensor scale2, bool amx) {
  STD_TORCH_CHECK(usable(amx), "residual_block_int8 needs a processor with ", amx ? "AMX" : "VNNI", " for 8 bits");
  const Images images = images_of(features);
  for (const Tensor& scale : {in_scale, scale1, scale2}) check_vector(images, scale, ScalarType::Float);
  for (const Tensor& bias : {bias1, bias2}) check_vector(images, bias, ScalarType::Int);
  const Tensor first = packed(images, weight1), second = packed(images, weight2);
  const Layer layers[2] = {{read<int8_t>(first), read<int32_t>(bias1), read<float>(scale1)},
                           {read<int8_t>(second), read<int32_t>(bias2), read<float>(scale2)}};
  Tensor out = torch::stable::empty_like(features);
  images_of(out);  // empty_like keeps the layout
  const float* x = read<float>(features);
  float* result = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, images.strips(), 1, [&](int64_t from, int64_t to) {
    forward(amx ? Unit::kAmx : Unit::kVnni, images, from, to, x, read<float>(in_scale), layers[0], layers[1], result);
  });
  return out;
}

}  // namespace
}  // namespace fastsimgan::int8

// The schemas, the fake and the fallback for other devices are Python's (fastsimgan/ops/residual_block_int8.py).
STABLE_TORCH_LIBRARY_IMPL(fastsimgan, CompositeExplicitAutograd, m) {
  m.impl("int8_usable", TORCH_BOX(&fastsimgan::int8::usable));
}

STABLE_TORCH_LIBRARY_IMPL(fastsimgan, CPU, m) {
  m.impl("residual_block_int8", TORCH_BOX(&fastsimgan::int8::residual_block_cpu));
}
