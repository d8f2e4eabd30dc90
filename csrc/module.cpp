// fastsimgan._C: loading it registers the ops. What Python sees of it: how it was built, and the index sampler.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "history_swap.h"

namespace py = pybind11;

namespace {

// The (slot, fresh, drawn) of every task of one swap; see Task. For the tests: it needs no tensor and no device.
std::vector<std::tuple<int64_t, int64_t, int64_t>> tasks(int64_t seed, int64_t swap, int64_t fill, int64_t capacity,
                                                          int64_t n) {
  if (n < 1 || n > capacity || fill < 0 || fill > capacity || capacity >= (int64_t{1} << 31))
    throw std::invalid_argument("tasks needs 1 <= n <= capacity < 2^31 and 0 <= fill <= capacity");
  const fastsimgan::Swap plan(seed, swap, fill, capacity, n);
  std::vector<std::tuple<int64_t, int64_t, int64_t>> result;
  for (int64_t number = 0; number < 2 * n; ++number) {
    const fastsimgan::Task task = plan.task(number);
    if (task.slot >= 0) result.emplace_back(task.slot, task.fresh, task.drawn);
  }
  return result;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = FASTSIMGAN_TORCH_VERSION;
  info["cuda"] = static_cast<bool>(FASTSIMGAN_WITH_CUDA);
  info["nvcc"] = FASTSIMGAN_NVCC_VERSION;
  info["cuda_architectures"] = FASTSIMGAN_CUDA_ARCHITECTURES;
  info["compiler"] = FASTSIMGAN_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled ops of fastsimgan. Import torch first.";
  module.def("build_info", &build_info, "torch, cuda, nvcc, cuda_architectures and compiler it was built with.");
  module.def("tasks", &tasks, py::arg("seed"), py::arg("swap"), py::arg("fill"), py::arg("capacity"), py::arg("n"),
             "The (slot, fresh, drawn) of every task of one history_swap; -1: not written, not drawn.");
}
