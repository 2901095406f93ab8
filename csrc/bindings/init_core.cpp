// Binds what describes the build and the machine: version, compiler, targets, threads.
#include <pybind11/stl.h>

#include <map>
#include <vector>

#include "bindings/arrays.h"
#include "core/dispatch.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "covariance/covariance.h"
#include "jvp/jvp.h"
#include "topk/topk.h"

namespace scalpel::bindings {
namespace py = pybind11;
namespace {

#define SCALPEL_TEXT_OF(x) #x
#define SCALPEL_TEXT(x) SCALPEL_TEXT_OF(x)

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " SCALPEL_TEXT(__GNUC__) "." SCALPEL_TEXT(__GNUC_MINOR__) "." SCALPEL_TEXT(__GNUC_PATCHLEVEL__);
#else
  return "unknown";
#endif
}

std::vector<py::dict> target_list() {
  std::vector<py::dict> list;
  for (int i = 0; i < kTargetCount; ++i) {
    const TargetInfo& t = targets()[i];
    py::dict entry;
    entry["name"] = t.name;
    entry["description"] = t.description;
    entry["needs"] = t.needs;
    entry["built"] = t.built;
    entry["supported"] = t.supported();
    list.push_back(entry);
  }
  return list;
}

// Lets the tests verify that a forced kernel is the one that ran.
std::map<std::string, py::dict> kernel_calls() {
  std::map<std::string, py::dict> ops;
  for (int i = 0; i < kTargetCount; ++i) {
    const TargetInfo& t = targets()[i];
    if (!t.built) continue;
    ops["topk"][t.name] = py::make_tuple(topk_compiled_for(t.target), topk_calls(t.target));
    ops["covariance"][t.name] = py::make_tuple(covariance_compiled_for(t.target), covariance_calls(t.target));
    ops["jvp"][t.name] = py::make_tuple(jvp_compiled_for(t.target), jvp_calls(t.target));
  }
  return ops;
}

}  // namespace

void init_core(py::module_& m) {
  m.def("version", [] { return SCALPEL_VERSION; }, "The version that this module was built from.");
  m.def("compiler", &compiler, "The compiler that built this module.");
  m.def("parallel_backend", &parallel_backend, "The version of OpenMP that parallel loops use.");
  m.def("max_threads", &max_threads, "The number of threads that a parallel loop uses at most.");
  m.def("targets", &target_list,
        "Every CPU target, the most wanted first, and whether it is built and supported here.");
  m.def(
      "active_target", [] { return active_target().name; },
      "The target in use. ValueError if SCALPEL_TARGET is wrong.");
  m.def("force_target", &force_target, py::arg("name"),
        "Force a target from now on; '' restores the default. For tests.");
  m.def(
      "prefer_huge_pages",
      [](std::uintptr_t address, std::int64_t bytes) {
        prefer_huge_pages(reinterpret_cast<void*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"), "Ask for huge pages in fresh memory; a hint.");
  m.def("kernel_calls", &kernel_calls,
        "{op: {target: (target its file was compiled for, calls so far)}}. For tests.");
}

}  // namespace scalpel::bindings
