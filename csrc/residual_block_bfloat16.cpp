// The ops fastsimgan::residual_block_bfloat16 and its backward on the CPU: checks, memory and threads; the arithmetic is
// in residual_block_bfloat16_amx.cpp, which no processor without AMX may enter.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_features.h"
#include "residual_block_bfloat16.h"
#include "residual_block_tensors.h"

namespace fastsimgan::residual_block_bfloat16 {
namespace {

// Sums are taken over a number of groups that depends on the size alone, then over the groups in order: the same bits
// for any number of threads.
constexpr int64_t kGroups = 16;

Images images_of(const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(cpu_features::has_amx_bfloat16(),
                  "residual_block_bfloat16 needs a processor with AMX and AVX-512 for bfloat16");
  return channels_last<Images>(x, type, kMaps);
}

void check_same(const Images& images, const Tensor& other, ScalarType type = ScalarType::Float) {
  check_equal(images, images_of(other, type));
}

// In a tensor, whose memory begins at a cache line: what is loaded of it are whole lines.
Tensor packed(const Images& images, const Tensor& weight, bool backward) {
  check_weight(weight, ScalarType::Float, images.maps);
  Tensor result = torch::stable::new_empty(weight, {images.weights()}, ScalarType::BFloat16);
  pack_weights(read<float>(weight), strides_of(weight).data(), images.maps, backward, write<bfloat16>(result));
  return result;
}

std::tuple<Tensor, Tensor> forward_on_cpu(Tensor features, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) {
  const Images images = images_of(features, ScalarType::Float);
  for (const Tensor& bias : {bias1, bias2}) check_values(bias, ScalarType::Float, images.maps, "biases");
  const Tensor first = packed(images, weight1, false), second = packed(images, weight2, false);
  Tensor out = torch::stable::empty_like(features);
  Tensor hidden = torch::stable::empty(features.sizes(), ScalarType::BFloat16, std::nullopt, std::nullopt, std::nullopt,
                                       torch::headeronly::MemoryFormat::ChannelsLast);
  check_same(images, out);  // empty_like keeps the layout
  check_same(images, hidden, ScalarType::BFloat16);
  const float* x = read<float>(features);
  bfloat16* kept = write<bfloat16>(hidden);
  float* result = write<float>(out);
  torch::stable::parallel_for(0, images.strips(), 1, [&](int64_t from, int64_t to) {
    forward(images, from, to, x, read<bfloat16>(first), read<float>(bias1), read<bfloat16>(second), read<float>(bias2), kept, result);
  });
  return {out, hidden};
}

// Summed over groups into the first, in order.
void add_groups(std::vector<float>& sums, int64_t groups) {
  const int64_t size = static_cast<int64_t>(sums.size()) / groups;
  for (int64_t group = 1; group < groups; ++group)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[group * size + i];
}

Tensor as_weight(const Tensor& like, const std::vector<float>& sums, int64_t maps) {  // [3, 3, in, out] → [out, in, 3, 3]
  Tensor result = torch::stable::new_empty(like, {maps, maps, 3, 3});
  float* to = write<float>(result);
  for (int64_t out = 0; out < maps; ++out)
    for (int64_t in = 0; in < maps; ++in)
      for (int64_t tap = 0; tap < 9; ++tap) *to++ = sums[(tap * maps + in) * maps + out];
  return result;
}

Tensor as_bias(const Tensor& like, const std::vector<float>& sums, int64_t maps) {
  Tensor result = torch::stable::new_empty(like, {maps});
  std::copy_n(sums.data(), maps, write<float>(result));
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_on_cpu(Tensor grad, Tensor features, Tensor hidden,
                                                                   Tensor out, Tensor weight1, Tensor weight2) {
  const Images images = images_of(features, ScalarType::Float);
  for (const Tensor& other : {grad, out}) check_same(images, other);
  check_same(images, hidden, ScalarType::BFloat16);
  const Tensor first = packed(images, weight1, true), second = packed(images, weight2, true);
  Tensor grad_features = torch::stable::empty_like(features);
  check_same(images, grad_features);
  const int64_t groups = std::min(images.strips(), kGroups), weights = images.weights(), maps = images.maps;
  std::vector<float> of_weight1(groups * weights), of_weight2(groups * weights);
  std::vector<float> of_bias1(groups * maps), of_bias2(groups * maps);
  float* to_features = write<float>(grad_features);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group)
      backward(images, group * images.strips() / groups, (group + 1) * images.strips() / groups, read<float>(grad),
               read<float>(features), read<bfloat16>(hidden), read<float>(out), read<bfloat16>(first), read<bfloat16>(second), to_features,
               {of_weight1.data() + group * weights, of_bias1.data() + group * maps,
                of_weight2.data() + group * weights, of_bias2.data() + group * maps});
  });
  for (auto* sums : {&of_weight1, &of_bias1, &of_weight2, &of_bias2}) add_groups(*sums, groups);
  return {grad_features, as_weight(weight1, of_weight1, maps), as_bias(features, of_bias1, maps),
          as_weight(weight2, of_weight2, maps), as_bias(features, of_bias2, maps)};
}

}  // namespace
}  // namespace fastsimgan::residual_block_bfloat16

// The schemas, the fakes and the fallback for other devices are Python's (fastsimgan/ops/residual_block.py).
STABLE_TORCH_LIBRARY_IMPL(fastsimgan, CompositeExplicitAutograd, m) {
  m.impl("amx_usable", TORCH_BOX(&fastsimgan::cpu_features::has_amx_bfloat16));
}

STABLE_TORCH_LIBRARY_IMPL(fastsimgan, CPU, m) {
  m.impl("residual_block_bfloat16", TORCH_BOX(&fastsimgan::residual_block_bfloat16::forward_on_cpu));
  m.impl("residual_block_bfloat16_backward", TORCH_BOX(&fastsimgan::residual_block_bfloat16::backward_on_cpu));
}
