// The op fastsimgan::history_swap on the CPU and the door to its CUDA kernel. Registered through torch's stable ABI, so
// that one binary serves several versions of torch.
#include "history_swap.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if FASTSIMGAN_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>
#endif

#include <atomic>
#include <cstring>
#include <type_traits>

namespace fastsimgan {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// round((x + 1) * 127.5), halves to even, clamped to 0..255; NaN becomes 0.
inline uint8_t to_uint8(float x) {
  float y = (x + 1.0f) * 127.5f;
  y = y > 0.0f ? y : 0.0f;
  y = y < 255.0f ? y : 255.0f;
  // Adding 2^23 leaves the rounded integer in the low bits. Unlike rintf, this vectorises on any x86-64.
  y += 8388608.0f;
  uint32_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  return static_cast<uint8_t>(bits);
}

// The two conversions of the default buffer, chosen at load time for the processor at hand. No FMA in either, so that
// they round as the reference does.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FASTSIMGAN_AVX2 __attribute__((target_clones("avx2", "default")))
#else
#define FASTSIMGAN_AVX2
#endif

FASTSIMGAN_AVX2 void convert(const float* __restrict__ from, uint8_t* __restrict__ to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_uint8(from[i]);
}

FASTSIMGAN_AVX2 void convert(const uint8_t* __restrict__ from, float* __restrict__ to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]) / 127.5f - 1.0f;
}

template <typename From, typename To>
void convert(const From* __restrict__ from, To* __restrict__ to, int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, count * sizeof(To));
  } else if constexpr (std::is_same_v<To, uint8_t>) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_uint8(static_cast<float>(from[i]));
  } else if constexpr (std::is_same_v<From, uint8_t>) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]) / 127.5f - 1.0f);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
  }
}

template <typename Stored, typename Image>
void swap_on_cpu(Stored* storage, int64_t* state, const Image* fresh, Image* drawn, int64_t capacity,
                 int64_t image_numel, int64_t n) {
  const Swap swap(state, capacity, n);
  int64_t* written_by = state + kHeader;
  std::atomic<int64_t> age_sum{0};
  // A task moves an image twice at most; below some 32 k elements a thread costs more than it saves.
  const int64_t grain = 1 + 32768 / (image_numel + 1);
  torch::stable::parallel_for(0, 2 * n, grain, [&](int64_t begin, int64_t end) {
    int64_t age = 0;
    for (int64_t number = begin; number < end; ++number) {
      const Task task = swap.task(number);
      if (task.slot < 0) continue;
      Stored* slot = storage + task.slot * image_numel;
      const bool draw_before = task.drawn >= 0 && !task.appended;
      if (draw_before) {
        convert(slot, drawn + task.drawn * image_numel, image_numel);
        age += swap.number() - written_by[task.slot];
      }
      if (task.fresh >= 0) {
        convert(fresh + task.fresh * image_numel, slot, image_numel);
        written_by[task.slot] = swap.number();
      }
      if (task.drawn >= 0 && !draw_before) convert(slot, drawn + task.drawn * image_numel, image_numel);
    }
    age_sum += age;
  });
  state[kSwaps] = swap.number() + 1;
  state[kFill] = swap.filled();
  state[kDrawn] = n;
  state[kAgeSum] = age_sum;
}

// What would make the kernels touch memory that is not theirs. The Python side has checked the same, and says it better.
void check(const Tensor& storage, const Tensor& state, const Tensor& fresh, int64_t n) {
  STD_TORCH_CHECK(storage.dim() >= 1 && fresh.dim() >= 1, "storage and fresh must be [count, *image]");
  const int64_t capacity = storage.size(0);
  STD_TORCH_CHECK(storage.numel() > 0, "storage must hold at least one pixel");
  STD_TORCH_CHECK(n >= 1 && n <= capacity && capacity < (int64_t{1} << 31),
                  "capacity must be at least n=", n, " and below 2^31, got ", capacity);
  STD_TORCH_CHECK(fresh.size(0) == n && fresh.numel() / n == storage.numel() / capacity,
                  "fresh must hold n=", n, " images of the storage's size");
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Long && state.numel() == kHeader + capacity,
                  "state must be int64 of length ", kHeader + capacity, ", got length ", state.numel());
  STD_TORCH_CHECK(storage.is_contiguous() && state.is_contiguous() && fresh.is_contiguous(),
                  "storage, state and fresh must be contiguous");
  STD_TORCH_CHECK(storage.device() == state.device() && storage.device() == fresh.device(),
                  "storage, state and fresh must be on one device");
}

// Calls `function` with a null pointer of the C++ type that `type` names.
template <typename Function>
void with_image_type(ScalarType type, const Function& function) {
  switch (type) {
    case ScalarType::Float: return function(static_cast<float*>(nullptr));
    case ScalarType::Half: return function(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16: return function(static_cast<BFloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, "images must be float16, bfloat16 or float32");
  }
}

template <typename Function>
void with_stored_type(ScalarType type, const Function& function) {
  if (type == ScalarType::Byte) return function(static_cast<uint8_t*>(nullptr));
  with_image_type(type, function);
}

Tensor history_swap_cpu(Tensor storage, Tensor state, Tensor fresh, int64_t n) {
  check(storage, state, fresh, n);
  Tensor drawn = torch::stable::new_empty(fresh, fresh.sizes());
  with_stored_type(storage.scalar_type(), [&](auto* stored) {
    with_image_type(fresh.scalar_type(), [&](auto* image) {
      using Stored = std::remove_pointer_t<decltype(stored)>;
      using Image = std::remove_pointer_t<decltype(image)>;
      swap_on_cpu(static_cast<Stored*>(storage.mutable_data_ptr()), static_cast<int64_t*>(state.mutable_data_ptr()),
                  static_cast<const Image*>(fresh.const_data_ptr()), static_cast<Image*>(drawn.mutable_data_ptr()),
                  storage.size(0), fresh.numel() / n, n);
    });
  });
  return drawn;
}

#if FASTSIMGAN_WITH_CUDA
Dtype dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return Dtype::kUint8;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBfloat16;
    case ScalarType::Float: return Dtype::kFloat32;
    default: STD_TORCH_CHECK(false, "storage must be uint8, float16, bfloat16 or float32");
  }
}

Tensor history_swap_on_cuda(Tensor storage, Tensor state, Tensor fresh, int64_t n) {
  check(storage, state, fresh, n);
  STD_TORCH_CHECK(fresh.scalar_type() != ScalarType::Byte, "images must be float16, bfloat16 or float32");
  const torch::stable::accelerator::DeviceGuard guard(storage.get_device_index());
  Tensor drawn = torch::stable::new_empty(fresh, fresh.sizes());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(storage.get_device_index(), &stream));
  const char* error = history_swap_cuda(storage.mutable_data_ptr(), dtype(storage.scalar_type()),
                                        static_cast<int64_t*>(state.mutable_data_ptr()), fresh.const_data_ptr(),
                                        drawn.mutable_data_ptr(), dtype(fresh.scalar_type()), storage.size(0),
                                        fresh.numel() / n, n, stream);
  STD_TORCH_CHECK(error == nullptr, "history_swap: ", error);
  return drawn;
}
#endif

}  // namespace
}  // namespace fastsimgan

// The schema, the fake and the fallback for other devices are Python's (fastsimgan/ops/history_swap.py).
STABLE_TORCH_LIBRARY_IMPL(fastsimgan, CPU, m) { m.impl("history_swap", TORCH_BOX(&fastsimgan::history_swap_cpu)); }

#if FASTSIMGAN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastsimgan, CUDA, m) { m.impl("history_swap", TORCH_BOX(&fastsimgan::history_swap_on_cuda)); }
#endif
