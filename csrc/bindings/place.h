// Where the ops of a module run. The same binding files are compiled twice: into _core, whose ops take a
// number of threads, and into _cuda, whose ops take a device and a stream.
#pragma once

#include <pybind11/pybind11.h>

#if defined(SCALPEL_BINDS_CUDA)

#include <cstdint>
#include <utility>

#include "jvp/cuda/jvp_cuda.h"
#include "topk/topk_cuda.h"

namespace scalpel::bindings {

namespace ops = ::scalpel::cuda;
using Place = std::pair<int, std::uintptr_t>;  // device, stream
using At = const CudaQueue&;

inline CudaQueue run_at(const Place& place) {
  return {place.first, reinterpret_cast<cudaStream_t>(place.second)};
}
inline pybind11::arg place() { return pybind11::arg("queue"); }

}  // namespace scalpel::bindings

#else

#include "jvp/jvp.h"
#include "topk/topk.h"

namespace scalpel::bindings {

namespace ops = ::scalpel;
using Place = int;  // threads
using At = int;

inline int run_at(Place threads) { return threads; }
inline pybind11::arg_v place() { return pybind11::arg("threads") = 0; }

}  // namespace scalpel::bindings

#endif
