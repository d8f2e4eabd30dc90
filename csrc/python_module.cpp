// fastsimgan._C: importing it loads torch and the library beside it, which registers the ops. What Python sees of it:
// how it was built, and the index sampler.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <filesystem>
#include <stdexcept>
#include <string>
#include <tuple>
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
  info["no_cuda"] = FASTSIMGAN_NO_CUDA;
  info["avx2"] = static_cast<bool>(FASTSIMGAN_WITH_AVX2);
  info["amx"] = static_cast<bool>(FASTSIMGAN_WITH_AMX);
  info["nvcc"] = FASTSIMGAN_NVCC_VERSION;
  info["cuda_architectures"] = FASTSIMGAN_CUDA_ARCHITECTURES;
  info["compiler"] = FASTSIMGAN_COMPILER;
  return info;
}

// The ops' library lies beside this one. Through torch, so that its own libraries are there to be found by name.
void load_ops() {
  Dl_info here;
  if (dladdr(reinterpret_cast<void*>(&load_ops), &here) == 0) throw py::import_error("dladdr does not know fastsimgan._C");
  const std::filesystem::path library = std::filesystem::path(here.dli_fname).replace_filename(FASTSIMGAN_OPS_LIBRARY);
  try {
    py::module_::import("torch").attr("ops").attr("load_library")(library.string());
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_OSError)) throw;
    // Torch's own libraries do not fit: older than 2.11, or without the CUDA that this was built for. The loader's
    // message is the cause of torch's.
    const py::object cause = error.value().attr("__cause__");
    throw py::import_error(FASTSIMGAN_OPS_LIBRARY ", built against torch " FASTSIMGAN_TORCH_VERSION ", does not load: " +
                           std::string(py::str(cause.is_none() ? error.value() : cause)));
  }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  load_ops();
  module.doc() = "The compiled ops of fastsimgan.";
  module.def("build_info", &build_info,
             "torch, cuda, no_cuda (why not), avx2, amx, nvcc, cuda_architectures and compiler it was built with.");
  module.def("tasks", &tasks, py::arg("seed"), py::arg("swap"), py::arg("fill"), py::arg("capacity"), py::arg("n"),
             "The (slot, fresh, drawn) of every task of one history_swap; -1: not written, not drawn.");
}
