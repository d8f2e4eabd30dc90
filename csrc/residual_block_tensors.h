// What the ops of the residual blocks on the CPU ask of their tensors. For files compiled for any processor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

namespace fastsimgan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* write(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Char: return "int8";
    default: return "another type";
  }
}

// The size, {count, height, width, maps}, of a tensor [count, C, height, width] whose memory is [count, height, width, C].
template <typename Size>
Size channels_last(const Tensor& x, ScalarType type, int64_t unit) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == type, "features must be ", name_of(type), " [B, C, H, W]");
  const Size size{x.size(0), x.size(2), x.size(3), x.size(1)};
  STD_TORCH_CHECK(x.numel() > 0 && size.maps % unit == 0, "features must not be empty and their number of maps a multiple of ",
                  unit, ", got ", size.maps);
  const int64_t expected[4] = {size.height * size.width * size.maps, 1, size.width * size.maps, size.maps};
  for (int64_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(x.size(i) == 1 || x.stride(i) == expected[i], "features must be channels_last");
  return size;
}

template <typename Size>
void check_equal(const Size& one, const Size& other) {
  STD_TORCH_CHECK(one.count == other.count && one.height == other.height && one.width == other.width &&
                      one.maps == other.maps,
                  "gradient, features, hidden features and result must be of one shape");
}

inline void check_weight(const Tensor& weight, ScalarType type, int64_t maps) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == type && weight.size(0) == maps &&
                      weight.size(1) == maps && weight.size(2) == 3 && weight.size(3) == 3,
                  "weights must be ", name_of(type), " [C, C, 3, 3] with C=", maps);
}

inline std::array<int64_t, 4> strides_of(const Tensor& weight) {
  return {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
}

// A value for each map: `what` are biases or scales.
inline void check_values(const Tensor& values, ScalarType type, int64_t maps, const char* what) {
  STD_TORCH_CHECK(values.dim() == 1 && values.scalar_type() == type && values.size(0) == maps && values.stride(0) == 1,
                  what, " must be contiguous ", name_of(type), " [C] with C=", maps);
}

}  // namespace fastsimgan
