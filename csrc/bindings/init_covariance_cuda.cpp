// Binds the two covariance kernels of covariance_cuda.h.
#include "bindings/arrays.h"
#include "bindings/place.h"
#include "covariance/covariance_cuda.h"

namespace scalpel::bindings {
namespace py = pybind11;
namespace {

void column_sums(const ArrayTuple& x, double limit, const ArrayTuple& sums, const ArrayTuple& told,
                 const Place& where) {
  const TensorView rows = view_of(x), to = view_of(sums), extremes = view_of(told);
  const py::gil_scoped_release release;
  ops::column_sums(rows, limit, to, extremes, run_at(where));
}

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
  m.attr("COLUMN_SUMS_ROWS") = ops::kColumnSumsRows;
  m.def("column_sums", &column_sums, py::arg("x"), py::arg("limit"), py::arg("sums"), py::arg("told"),
        place(),
        "Sums of x - x[0] over chunks of rows; told: the first bad row, the largest |x| and |x - x[0]|.");
  m.def("gram_lower", &gram_lower, py::arg("x"), py::arg("shift"), py::arg("scatter"), py::arg("splits"),
        place(), "Adds the Gram matrix of x - shift to the lower triangle of scatter; shift may be None.");
}

}  // namespace scalpel::bindings
