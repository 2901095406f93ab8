// Binds the three ops of topk.h, for the CPU and the GPU alike.
#include "bindings/arrays.h"
#include "bindings/place.h"

namespace scalpel::bindings {
namespace py = pybind11;
namespace {

using Op = void (*)(const TensorView&, std::int64_t, RankBy, const TensorView&, At);

template <Op op>
void call(const ArrayTuple& x, std::int64_t k, bool by_value, const ArrayTuple& out, const Place& where) {
  const TensorView from = view_of(x);
  const TensorView to = view_of(out);
  const py::gil_scoped_release release;
  op(from, k, by_value ? RankBy::kValue : RankBy::kMagnitude, to, run_at(where));
}

}  // namespace

void init_topk(py::module_& m) {
  const auto def = [&m](const char* name, auto* f, const char* doc) {
    m.def(name, f, py::arg("x"), py::arg("k"), py::arg("by_value"), py::arg("out"), place(), doc);
  };
  def("topk_mask", &call<ops::topk_mask>,
      "Write True at the k kept places of each row. Arrays: (address, dtype, shape, strides).");
  def("keep_topk", &call<ops::keep_topk>, "Write x where it is kept and 0 elsewhere.");
  def("topk_indices", &call<ops::topk_indices>, "Write the kept places of each row in ascending order.");
}

}  // namespace scalpel::bindings
