#include "bindings/arrays.h"
#include "covariance/covariance.h"

namespace scalpel::bindings {
namespace py = pybind11;
namespace {

// A state as Python holds it. The count, too, is memory that the op writes: between the return of a call and
// Python's next statement an interrupt (Ctrl-C) may come, and a count kept by Python would then be left
// behind.
class State {
 public:
  State(const ArrayTuple& count, const ArrayTuple& mean, const ArrayTuple& scatter, bool centered) {
    const TensorView n = view_of(count);
    const TensorView m = view_of(mean);
    const TensorView s = view_of(scatter);
    const std::int64_t dim = m.width();
    if (n.dtype != DType::kInt64 || n.ndim != 1 || n.shape[0] != 1 || m.dtype != DType::kFloat64 ||
        s.dtype != DType::kFloat64 || m.ndim != 1 || s.ndim != 2 || s.shape[0] != dim || s.shape[1] != dim ||
        (dim > 1 && (m.strides[0] != 1 || s.strides[1] != 1 || s.strides[0] != dim))) {
      throw std::invalid_argument(
          "count must be int64 of shape (1,), mean and scatter contiguous float64 of shapes (dim,) and "
          "(dim, dim)");
    }
    count_ = static_cast<std::int64_t*>(n.data);
    moments = {*count_, dim, static_cast<double*>(m.data), static_cast<double*>(s.data), centered};
  }
  void store_count() const { *count_ = moments.count; }

  Moments moments;

 private:
  std::int64_t* count_;
};

std::int64_t update(const ArrayTuple& count, const ArrayTuple& mean, const ArrayTuple& scatter, bool centered,
                    const ArrayTuple& x, int threads) {
  State state(count, mean, scatter, centered);
  const TensorView rows = view_of(x);
  const py::gil_scoped_release release;
  const std::int64_t bad = update_moments(state.moments, rows, threads);
  state.store_count();
  return bad;
}

using Pair = void (*)(Moments&, const Moments&, int);

template <Pair op>
void combine(const ArrayTuple& count, const ArrayTuple& mean, const ArrayTuple& scatter, bool centered,
             const ArrayTuple& other_count, const ArrayTuple& other_mean, const ArrayTuple& other_scatter,
             int threads) {
  State state(count, mean, scatter, centered);
  const State other(other_count, other_mean, other_scatter, centered);
  const py::gil_scoped_release release;
  op(state.moments, other.moments, threads);
  state.store_count();
}

}  // namespace

void init_covariance(py::module_& m) {
  m.def(
      "update_moments", &update, py::arg("count"), py::arg("mean"), py::arg("scatter"), py::arg("centered"),
      py::arg("x"), py::arg("threads") = 0,
      "Add the rows of x to a state, its count included, in place. Returns -1, or the index of the first row "
      "that isn't finite.");
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
