// The op fastsimgan::residual_block on the CPU: checks, memory and threads; the arithmetic is in
// residual_block_float32_winograd.h, compiled for AVX2 and for AVX-512.
#include "residual_block_float32.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu_features.h"
#include "residual_block_tensors.h"

namespace fastsimgan::residual_block_float32 {
namespace {

const Kernels& kernels_for(int64_t maps) {
  return cpu_features::has_avx512() && maps % kAvx512.lanes == 0 ? kAvx512 : kAvx2;
}

Features features_of(const Tensor& x) {
  STD_TORCH_CHECK(cpu_features::has_avx2(), "residual_block in C++ needs a processor with AVX2 and FMA");
  const Features f = channels_last<Features>(x, ScalarType::Float, kAvx2.lanes);
  STD_TORCH_CHECK(f.maps <= kMostMaps, "feature maps must be at most 1024, got ", f.maps);
  return f;
}

void check_same(const Features& f, const Tensor& other) { check_equal(f, features_of(other)); }

std::unique_ptr<float[]> floats(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }  // not zeroed

std::unique_ptr<float[]> transformed(const Tensor& weight, int64_t maps, bool backward) {
  auto result = floats(36 * maps * maps);
  kernels_for(maps).transform_weights(read<float>(weight), strides_of(weight).data(), maps, backward, result.get());
  return result;
}

struct Ending {
  const float* bias = nullptr;
  const float* add = nullptr;
  const float* positive = nullptr;
  bool relu = false;
};

void convolve_all(const Features& f, const float* in, const float* weights, const Ending& ending, float* out) {
  torch::stable::parallel_for(0, f.strips(), 1, [&](int64_t from, int64_t to) {
    const auto scratch = floats(2 * f.transformed());
    kernels_for(f.maps).convolve(f, from, to, in, weights, ending.bias, ending.add, ending.positive, ending.relu, out,
                                 scratch.get());
  });
}

// Sums are taken over a number of groups that depends on the size alone, then over the groups in order: the same bits
// for any number of threads.
constexpr int64_t kGroups = 8;

Tensor weight_gradient_of_all(const Features& f, const Tensor& weight, const float* in, const float* grad) {
  const int64_t groups = std::clamp<int64_t>(f.strips() / 4, 1, kGroups), size = 36 * f.maps * f.maps;
  std::vector<float> sums(groups * size);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t from, int64_t to) {
    const auto scratch = floats(2 * f.transformed());
    for (int64_t group = from; group < to; ++group)
      kernels_for(f.maps).weight_gradient(f, group * f.strips() / groups, (group + 1) * f.strips() / groups, in, grad,
                                          sums.data() + group * size, scratch.get());
  });
  for (int64_t group = 1; group < groups; ++group)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[group * size + i];
  Tensor result = torch::stable::new_empty(weight, weight.sizes());
  kernels_for(f.maps).transform_back(sums.data(), f.maps, write<float>(result));
  return result;
}

// Masks `grad` where `out` is not positive (null: nowhere) into `masked`; gives the sum over all pixels, [C].
Tensor masked_sum(const Features& f, const Tensor& like, const float* grad, const float* out, float* masked) {
  const int64_t pixels = f.count * f.height * f.width, groups = std::min(kGroups, pixels);
  std::vector<float> sums(groups * f.maps);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group) {
      const int64_t first = group * pixels / groups, last = (group + 1) * pixels / groups;
      kernels_for(f.maps).mask_and_sum(grad + first * f.maps, out ? out + first * f.maps : nullptr, last - first,
                                       f.maps, masked ? masked + first * f.maps : nullptr,
                                       sums.data() + group * f.maps);
    }
  });
  Tensor result = torch::stable::new_empty(like, {f.maps});
  float* total = write<float>(result);
  for (int64_t c = 0; c < f.maps; ++c) {
    total[c] = sums[c];
    for (int64_t group = 1; group < groups; ++group) total[c] += sums[group * f.maps + c];
  }
  return result;
}

std::tuple<Tensor, Tensor> forward_on_cpu(Tensor features, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) {
  const Features f = features_of(features);
  for (const Tensor& weight : {weight1, weight2}) check_weight(weight, ScalarType::Float, f.maps);
  for (const Tensor& bias : {bias1, bias2}) check_values(bias, ScalarType::Float, f.maps, "biases");
  Tensor hidden = torch::stable::empty_like(features), out = torch::stable::empty_like(features);
  check_same(f, out);  // empty_like keeps the layout
  convolve_all(f, read<float>(features), transformed(weight1, f.maps, false).get(), {.bias = read<float>(bias1), .relu = true},
               write<float>(hidden));
  convolve_all(f, read<float>(hidden), transformed(weight2, f.maps, false).get(),
               {.bias = read<float>(bias2), .add = read<float>(features), .relu = true}, write<float>(out));
  return {out, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_on_cpu(Tensor grad, Tensor features, Tensor hidden,
                                                                   Tensor out, Tensor weight1, Tensor weight2) {
  const Features f = features_of(features);
  for (const Tensor& other : {grad, hidden, out}) check_same(f, other);
  for (const Tensor& weight : {weight1, weight2}) check_weight(weight, ScalarType::Float, f.maps);
  Tensor grad_features = torch::stable::empty_like(features);
  check_same(f, grad_features);
  const auto outer = floats(f.numel()), inner = floats(f.numel());  // gradients of the sums before each ReLU
  Tensor grad_bias2 = masked_sum(f, features, read<float>(grad), read<float>(out), outer.get());
  convolve_all(f, outer.get(), transformed(weight2, f.maps, true).get(), {.positive = read<float>(hidden)}, inner.get());
  Tensor grad_bias1 = masked_sum(f, features, inner.get(), nullptr, nullptr);
  convolve_all(f, inner.get(), transformed(weight1, f.maps, true).get(), {.add = outer.get()}, write<float>(grad_features));
  return {grad_features, weight_gradient_of_all(f, weight1, read<float>(features), inner.get()), grad_bias1,
          weight_gradient_of_all(f, weight2, read<float>(hidden), outer.get()), grad_bias2};
}

}  // namespace
}  // namespace fastsimgan::residual_block_float32

// The schemas, the fakes and the fallback for other devices are Python's (fastsimgan/ops/residual_block.py).
STABLE_TORCH_LIBRARY_IMPL(fastsimgan, CPU, m) {
  m.impl("residual_block", TORCH_BOX(&fastsimgan::residual_block_float32::forward_on_cpu));
  m.impl("residual_block_backward", TORCH_BOX(&fastsimgan::residual_block_float32::backward_on_cpu));
}
