// The CUDA kernel of fastsimgan::history_swap. No torch header: it compiles in seconds, beside any torch or none.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "history_swap.h"

namespace fastsimgan {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // loads in flight a thread before its first store
constexpr int64_t kChunk = 16384;  // elements of an image that one block moves, about

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(uint8_t x) { return __fdiv_rn(static_cast<float>(x), 127.5f) - 1.0f; }

__device__ inline void from_float(float x, float& out) { out = x; }
__device__ inline void from_float(float x, __half& out) { out = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
// Halves to even, clamped: white stays white. fmaxf drops a NaN, which becomes 0.
__device__ inline void from_float(float x, uint8_t& out) {
  out = static_cast<uint8_t>(__float2uint_rn(fminf(fmaxf((x + 1.0f) * 127.5f, 0.0f), 255.0f)));
}

template <typename T>
__device__ inline void convert(const T& from, T& to) {
  to = from;  // bit for bit
}
template <typename From, typename To>
__device__ inline void convert(const From& from, To& to) {
  from_float(to_float(from), to);
}

// blockIdx.x is a task of the swap (see Task), blockIdx.y a chunk of its image. Every element of a slot is read and
// then written by the same thread, so a slot that is both drawn and replaced needs no ordering between blocks.
template <typename Stored, typename Image, int kVector>
__global__ void __launch_bounds__(kThreads)
    history_swap_kernel(Stored* storage, int64_t* state, const Image* __restrict__ fresh, Image* __restrict__ drawn,
                        int64_t capacity, int64_t image_numel, int64_t n, int64_t chunk) {
  __shared__ Task shared_task;
  if (threadIdx.x == 0) {
    const Swap swap(state, capacity, n);
    const Task task = swap.task(blockIdx.x);
    if (blockIdx.y == 0 && task.slot >= 0) {
      int64_t* written_by = state + kHeader + task.slot;
      if (task.drawn >= 0 && !task.appended) {
        atomicAdd(reinterpret_cast<unsigned long long*>(state + kAgePartial),
                  static_cast<unsigned long long>(swap.number() - *written_by));
      }
      if (task.fresh >= 0) *written_by = swap.number();
    }
    // The last block to come by has seen every other one read the state, so it alone may move the state on.
    __threadfence();
    const unsigned long long blocks = static_cast<unsigned long long>(gridDim.x) * gridDim.y;
    if (atomicAdd(reinterpret_cast<unsigned long long*>(state + kTicket), 1ULL) == blocks - 1) {
      __threadfence();
      state[kSwaps] = swap.number() + 1;
      state[kFill] = swap.filled();
      state[kDrawn] = n;
      state[kAgeSum] = static_cast<int64_t>(atomicExch(reinterpret_cast<unsigned long long*>(state + kAgePartial), 0ULL));
      state[kTicket] = 0;
    }
    shared_task = task;
  }
  __syncthreads();
  const Task task = shared_task;
  if (task.slot < 0) return;

  const bool write = task.fresh >= 0, draw = task.drawn >= 0, read = draw && !task.appended;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * chunk;
  const int64_t end = begin + chunk < image_numel ? begin + chunk : image_numel;
  Stored* slot = storage + task.slot * image_numel;
  const Image* source = fresh + (write ? task.fresh : 0) * image_numel;
  Image* target = drawn + (draw ? task.drawn : 0) * image_numel;
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kVector;

  for (int64_t base = begin + threadIdx.x * kVector; base < end; base += kUnroll * stride) {
    Pack<Image, kVector> incoming[kUnroll];
    Pack<Stored, kVector> held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = base + u * stride;
      if (at >= end) continue;
      if (write) incoming[u] = *reinterpret_cast<const Pack<Image, kVector>*>(source + at);
      if (read) held[u] = *reinterpret_cast<const Pack<Stored, kVector>*>(slot + at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = base + u * stride;
      if (at >= end) continue;
      if (write) {
        Pack<Stored, kVector> stored;
        for (int i = 0; i < kVector; ++i) convert(incoming[u].value[i], stored.value[i]);
        *reinterpret_cast<Pack<Stored, kVector>*>(slot + at) = stored;
        if (task.appended) held[u] = stored;  // drawn in the same swap, if at all, as it is stored
      }
      if (draw) {
        Pack<Image, kVector> outgoing;
        for (int i = 0; i < kVector; ++i) convert(held[u].value[i], outgoing.value[i]);
        *reinterpret_cast<Pack<Image, kVector>*>(target + at) = outgoing;
      }
    }
  }
}

template <typename Stored, typename Image, int kVector>
cudaError_t launch(void* storage, int64_t* state, const void* fresh, void* drawn, int64_t capacity,
                   int64_t image_numel, int64_t n, cudaStream_t stream) {
  // Chunks of equal length, each a whole number of steps of the block.
  const int64_t step = kThreads * kVector;
  const int64_t pieces = (image_numel + kChunk - 1) / kChunk;
  const int64_t chunk = ((image_numel + pieces - 1) / pieces + step - 1) / step * step;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(2 * n), static_cast<unsigned>((image_numel + chunk - 1) / chunk));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, history_swap_kernel<Stored, Image, kVector>, static_cast<Stored*>(storage), state,
                            static_cast<const Image*>(fresh), static_cast<Image*>(drawn), capacity, image_numel, n,
                            chunk);
}

template <typename Stored, typename Image>
cudaError_t launch_aligned(void* storage, int64_t* state, const void* fresh, void* drawn, int64_t capacity,
                           int64_t image_numel, int64_t n, cudaStream_t stream) {
  // Four elements at a time where every image starts on such a boundary, which 35x55 does not.
  const auto misaligned = [](const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes; };
  if (image_numel % 4 || misaligned(storage, 4 * sizeof(Stored)) || misaligned(fresh, 4 * sizeof(Image)) ||
      misaligned(drawn, 4 * sizeof(Image)))
    return launch<Stored, Image, 1>(storage, state, fresh, drawn, capacity, image_numel, n, stream);
  return launch<Stored, Image, 4>(storage, state, fresh, drawn, capacity, image_numel, n, stream);
}

template <typename Stored>
cudaError_t launch_stored(void* storage, int64_t* state, const void* fresh, void* drawn, Dtype image, int64_t capacity,
                          int64_t image_numel, int64_t n, cudaStream_t stream) {
  switch (image) {
    case Dtype::kFloat16:
      return launch_aligned<Stored, __half>(storage, state, fresh, drawn, capacity, image_numel, n, stream);
    case Dtype::kBfloat16:
      return launch_aligned<Stored, __nv_bfloat16>(storage, state, fresh, drawn, capacity, image_numel, n, stream);
    case Dtype::kFloat32:
      return launch_aligned<Stored, float>(storage, state, fresh, drawn, capacity, image_numel, n, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t dispatch(void* storage, Dtype stored, int64_t* state, const void* fresh, void* drawn, Dtype image,
                     int64_t capacity, int64_t image_numel, int64_t n, cudaStream_t stream) {
  switch (stored) {
    case Dtype::kUint8:
      return launch_stored<uint8_t>(storage, state, fresh, drawn, image, capacity, image_numel, n, stream);
    case Dtype::kFloat16:
      return launch_stored<__half>(storage, state, fresh, drawn, image, capacity, image_numel, n, stream);
    case Dtype::kBfloat16:
      return launch_stored<__nv_bfloat16>(storage, state, fresh, drawn, image, capacity, image_numel, n, stream);
    case Dtype::kFloat32:
      return launch_stored<float>(storage, state, fresh, drawn, image, capacity, image_numel, n, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

const char* history_swap_cuda(void* storage, Dtype stored, int64_t* state, const void* fresh, void* drawn, Dtype image,
                              int64_t capacity, int64_t image_numel, int64_t n, void* stream) {
  const cudaError_t error = dispatch(storage, stored, state, fresh, drawn, image, capacity, image_numel, n,
                                     static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastsimgan
