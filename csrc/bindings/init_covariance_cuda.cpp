#include "bindings/arrays.h"
#include "bindings/place.h"
#include "covariance/covariance_cuda.h"

namespace scalpel::bindings {
namespace py = pybind11;
namespace {

void gram_lower(const ArrayTuple& x, const py::object& shift, const ArrayTuple& scatter, int splits,
                const Place& where) {
  const TensorView rows = view_of(x);
  const TensorView taken_off = shift.is_none() ? TensorView{} : view_of(shift.cast<ArrayTuple>());
  const TensorView to = view_of(scatter);
  const py::gil_scoped_release release;
  ops::gram_lower(rows, taken_off, to, splits, run_at(where));
}

}  // namespace

void init_covariance_cuda(py::module_& m) {
  m.def("gram_lower", &gram_lower, py::arg("x"), py::arg("shift"), py::arg("scatter"), py::arg("splits"),
        place(), "Adds the Gram matrix of x - shift to the lower triangle of scatter; shift may be None.");
}

}  // namespace scalpel::bindings
