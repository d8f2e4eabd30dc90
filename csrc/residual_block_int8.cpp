// The op fastsimgan::residual_block_int8 on the CPU: checks, memory and threads; the arithmetic is in
// residual_block_int8_amx.cpp and residual_block_int8_vnni.cpp, which no processor without their unit may enter.
#include "residual_block_int8.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu_features.h"
#include "residual_block_tensors.h"

namespace fastsimgan::residual_block_int8 {
namespace {

bool usable(bool amx) { return amx ? cpu_features::has_amx_int8() : cpu_features::has_vnni(); }

Images images_of(const Tensor& x) { return channels_last<Images>(x, ScalarType::Float, kMaps); }

// In a tensor, whose memory begins at a cache line: what is loaded of it are whole lines.
Tensor packed(const Images& images, const Tensor& weight) {
  check_weight(weight, ScalarType::Char, images.maps);
  Tensor result = torch::stable::new_empty(weight, {packed_bytes(images.maps)});
  pack_weights(read<int8_t>(weight), strides_of(weight).data(), images.maps, write<int8_t>(result));
  return result;
}

Tensor forward_on_cpu(Tensor features, Tensor in_scale, Tensor weight1, Tensor bias1, Tensor scale1, Tensor weight2,
                      Tensor bias2, Tensor scale2, bool amx) {
  STD_TORCH_CHECK(usable(amx), "residual_block_int8 needs a processor with ", amx ? "AMX" : "VNNI", " for 8 bits");
  const Images images = images_of(features);
  for (const Tensor& scale : {in_scale, scale1, scale2}) check_values(scale, ScalarType::Float, images.maps, "scales");
  for (const Tensor& bias : {bias1, bias2}) check_values(bias, ScalarType::Int, images.maps, "biases");
  const Tensor first = packed(images, weight1), second = packed(images, weight2);
  const Layer layers[2] = {{read<int8_t>(first), read<int32_t>(bias1), read<float>(scale1)},
                           {read<int8_t>(second), read<int32_t>(bias2), read<float>(scale2)}};
  Tensor out = torch::stable::empty_like(features);
  images_of(out);  // empty_like keeps the layout
  const float* x = read<float>(features);
  float* result = write<float>(out);
  torch::stable::parallel_for(0, images.strips(), 1, [&](int64_t from, int64_t to) {
    (amx ? forward_amx : forward_vnni)(images, from, to, x, read<float>(in_scale), layers[0], layers[1], result);
  });
  return out;
}

}  // namespace
}  // namespace fastsimgan::residual_block_int8

// The schemas, the fake and the fallback for other devices are Python's (fastsimgan/ops/residual_block_int8.py).
STABLE_TORCH_LIBRARY_IMPL(fastsimgan, CompositeExplicitAutograd, m) {
  m.impl("int8_usable", TORCH_BOX(&fastsimgan::residual_block_int8::usable));
}

STABLE_TORCH_LIBRARY_IMPL(fastsimgan, CPU, m) {
  m.impl("residual_block_int8", TORCH_BOX(&fastsimgan::residual_block_int8::forward_on_cpu));
}
