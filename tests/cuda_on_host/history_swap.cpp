// The CUDA kernel's source as a C++ library with one plain function, which tests/ops/test_history_swap.py calls.
#include "../../csrc/history_swap.cu"

extern "C" const char* history_swap(void* storage, int stored, int64_t* state, const void* fresh, void* drawn, int image,
                                    int64_t capacity, int64_t image_numel, int64_t n, bool reverse) {
  reverse_blocks = reverse;
  return fastsimgan::history_swap_cuda(storage, static_cast<fastsimgan::Dtype>(stored), state, fresh, drawn,
                                       static_cast<fastsimgan::Dtype>(image), capacity, image_numel, n, nullptr);
}
