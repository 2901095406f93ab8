#include "bindings/arrays.h"
#include "covariance/covariance.h"

namespace scalpel::bindings {
namespace py = pybind11;
namespace {

// A state as Python holds it: its count is immutable there, so the new one is returned.
Moments state_of(std::int64_t count, const ArrayTuple& mean, const ArrayTuple& scatter, bool centered) {
  const TensorView m = view_of(mean);
  const TensorView s = view_of(scatter);
  const std::int64_t dim = m.width();
  if (m.dtype != DType::kFloat64 || s.dtype != DType::kFloat64 || m.ndim != 1 || s.ndim != 2 ||
      s.shape[0] != dim || s.shape[1] != dim ||
      (dim > 1 && (m.strides[0] != 1 || s.strides[1] != 1 || s.strides[0] != dim))) {
    throw std::invalid_argument(
        "mean and scatter must be contiguous float64 of shapes (dim,) and (dim, dim)");
  }
  return {count, dim, static_cast<double*>(m.data), static_cast<double*>(s.data), centered};
}

std::int64_t update(std::int64_t count, const ArrayTuple& mean, const ArrayTuple& scatter, bool centered,
                    const ArrayTuple& x, int threads) {
  Moments state = state_of(count, mean, scatter, centered);
  const TensorView rows = view_of(x);
  const py::gil_scoped_release release;
  return update_moments(state, rows, threads);
}

using Pair = void (*)(Moments&, const Moments&, int);

template <Pair op>
void combine(std::int64_t count, const ArrayTuple& mean, const ArrayTuple& scatter, bool centered,
             std::int64_t other_count, const ArrayTuple& other_mean, const ArrayTuple& other_scatter,
             int threads) {
  Moments state = state_of(count, mean, scatter, centered);
  const Moments other = state_of(other_count, other_mean, other_scatter, centered);
  const py::gil_scoped_release release;
  op(state, other, threads);
}

}  // namespace

void init_covariance(py::module_& m) {
  m.def(
      "update_moments", &update, py::arg("count"), py::arg("mean"), py::arg("scatter"), py::arg("centered"),
      py::arg("x"), py::arg("threads") = 0,
      "Add the rows of x to a state, in place. Returns -1, or the index of the first row that isn't finite.");
  const auto def = [&m](const char* name, auto* f, const char* doc) {
    m.def(name, f, py::arg("count"), py::arg("mean"), py::arg("scatter"), py::arg("centered"),
          py::arg("other_count"), py::arg("other_mean"), py::arg("other_scatter"), py::arg("threads") = 0,
          doc);
  };
  def("merge_moments", &combine<merge_moments>, "Add the rows behind another state to a state, in place.");
  def("subtract_moments", &combine<subtract_moments>,
      "Take the rows behind another state out of a state, in place.");
}

}  // namespace scalpel::bindings
