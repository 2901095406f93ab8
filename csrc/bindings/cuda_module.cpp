// scalpel._cuda: the ops of scalpel._core on a GPU. The module loads without a driver, so that one build
// serves machines with and without a GPU; device_count() then reports why no GPU can be used.
#include "bindings/arrays.h"
#include "bindings/place.h"
#include "cuda/device.h"

#ifndef SCALPEL_CUDA_MODULE
#define SCALPEL_CUDA_MODULE _cuda
#endif

namespace py = pybind11;

PYBIND11_MODULE(SCALPEL_CUDA_MODULE, m) {
  m.doc() =
      "The native core of scalpel on GPUs. Internal, as _core is; queue is (device, address of a stream).";
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const scalpel::DTypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    }
  });
  m.def(
      "device_count",
      [] {
        int count = 0;
        scalpel::device::check(cudaGetDeviceCount(&count), "no GPU can be used");
        return count;
      },
      "How many GPUs there are. RuntimeError with the driver's reason where none can be used.");
  scalpel::bindings::init_topk(m);
  scalpel::bindings::init_jvp(m);
  scalpel::bindings::init_covariance_cuda(m);
}
