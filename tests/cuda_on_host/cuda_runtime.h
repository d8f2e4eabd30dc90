// What csrc/*.cu uses of CUDA, for a C++ compiler: a launch is a loop over the blocks, each of one thread, so that the
// kernels' arithmetic can be tested with no GPU and no CUDA toolkit. Blocks run in reverse order where asked: a kernel
// must not depend on it. Races and the work of many threads in a block are left to the tests that need a GPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;
inline bool reverse_blocks = false;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  gridDim = config->gridDim;
  const unsigned blocks = gridDim.x * gridDim.y;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = reverse_blocks ? blocks - 1 - i : i;
    blockIdx = dim3(block % gridDim.x, block / gridDim.x, 0);
    kernel(arguments...);
  }
  return cudaSuccess;
}

inline void __syncthreads() {}
inline void __threadfence() {}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  *address += value;
  return old;
}
inline unsigned long long atomicExch(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  *address = value;
  return old;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::nearbyint(x)); }
