// Binds the streaming moments of covariance.h.
#include "bindings/arrays.h"
#include "covariance/covariance.h"

namespace scalpel::bindings {
namespace py = pybind11;
namespace {

// The state as Python holds it. The op writes the counts into the caller's memory as well, because an
// interrupt (Ctrl-C) may arrive between the return of a call and Python's next statement: counts that Python
// updated itself would then disagree with the moments.
//
//   counts   (2,)             int64    rows that have been folded in, rows that still wait
//   mean     (dim,)           float64
//   scatter  (dim, dim)       float64, or (0, 0) before the first row is folded in
//   waiting  (capacity, dim)  the dtype of the waiting rows
class State {
 public:
  State(const ArrayTuple& counts, const ArrayTuple& mean, const ArrayTuple& scatter,
        const ArrayTuple& waiting, bool centered) {
    const TensorView n = view_of(counts);
    const TensorView m = view_of(mean);
    const TensorView s = view_of(scatter);
    const TensorView w = view_of(waiting);
    const std::int64_t dim = m.width();
    const bool none = s.ndim == 2 && s.shape[0] == 0;
    if (n.dtype != DType::kInt64 || n.ndim != 1 || n.shape[0] != 2 || m.dtype != DType::kFloat64 ||
        s.dtype != DType::kFloat64 || m.ndim != 1 || s.ndim != 2 || w.ndim != 2 ||
        !(none || is_packed(s, dim, dim)) || !(w.shape[0] == 0 || is_packed(w, w.shape[0], dim)) ||
        (dim > 1 && m.strides[0] != 1)) {
      throw std::invalid_argument(
          "counts must be int64 of shape (2,), mean and scatter contiguous float64 of shapes (dim,) and "
          "(dim, "
          "dim) or (0, 0), waiting contiguous of shape (capacity, dim)");
    }
    counts_ = static_cast<std::int64_t*>(n.data);
    moments = {counts_[0], dim, static_cast<double*>(m.data), none ? nullptr : static_cast<double*>(s.data),
               centered};
    rows = {w.data, w.shape[0], counts_[1], w.dtype};
  }
  void store_counts() const {
    counts_[0] = moments.count;
    counts_[1] = rows.filled;
  }

  Moments moments;
  Waiting rows;

 private:
  static bool is_packed(const TensorView& view, std::int64_t height, std::int64_t width) {
    return view.shape[0] == height && view.shape[1] == width && (width <= 1 || view.strides[1] == 1) &&
           (height <= 1 || view.strides[0] == width);
  }

  std::int64_t* counts_;
};

std::int64_t update(const ArrayTuple& counts, const ArrayTuple& mean, const ArrayTuple& scatter,
                    const ArrayTuple& waiting, bool centered, const ArrayTuple& x, int threads) {
  State state(counts, mean, scatter, waiting, centered);
  const TensorView rows = view_of(x);
  const py::gil_scoped_release release;
  const std::int64_t bad = update_moments(state.moments, state.rows, rows, threads);
  state.store_counts();
  return bad;
}

void fold(const ArrayTuple& counts, const ArrayTuple& mean, const ArrayTuple& scatter,
          const ArrayTuple& waiting, bool centered, int threads) {
  State state(counts, mean, scatter, waiting, centered);
  const py::gil_scoped_release release;
  fold_moments(state.moments, state.rows, threads);
  state.store_counts();
}

std::int64_t first_bad(const ArrayTuple& x, int threads) {
  const TensorView rows = view_of(x);
  const py::gil_scoped_release release;
  return bad_row(rows, threads);
}

double center(const ArrayTuple& x, bool centered, const ArrayTuple& mean, const ArrayTuple& out,
              int threads) {
  const TensorView rows = view_of(x);
  const TensorView to_mean = view_of(mean);
  const TensorView to = view_of(out);
  const py::gil_scoped_release release;
  return center_rows(rows, centered, to_mean, to, threads);
}

void symmetric(const ArrayTuple& counts, const ArrayTuple& mean, const ArrayTuple& scatter,
               const ArrayTuple& waiting, bool centered, const ArrayTuple& out, int threads) {
  const State state(counts, mean, scatter, waiting, centered);
  const TensorView view = view_of(out);
  const py::gil_scoped_release release;
  symmetric_moments(state.moments, view, threads);
}

using Pair = void (*)(Moments&, const Moments&, int);

template <Pair op>
void combine(const ArrayTuple& counts, const ArrayTuple& mean, const ArrayTuple& scatter,
             const ArrayTuple& waiting, bool centered, const ArrayTuple& other_counts,
             const ArrayTuple& other_mean, const ArrayTuple& other_scatter, const ArrayTuple& other_waiting,
             int threads) {
  State state(counts, mean, scatter, waiting, centered);
  const State other(other_counts, other_mean, other_scatter, other_waiting, centered);
  if (state.rows.filled + other.rows.filled > 0 || state.moments.scatter == nullptr ||
      other.moments.scatter == nullptr) {
    throw std::invalid_argument(
        "a state has waiting rows or no scatter; call fold_moments on both states first");
  }
  const py::gil_scoped_release release;
  op(state.moments, other.moments, threads);
  state.store_counts();
}

}  // namespace

void init_covariance(py::module_& m) {
  m.def("update_moments", &update, py::arg("counts"), py::arg("mean"), py::arg("scatter"), py::arg("waiting"),
        py::arg("centered"), py::arg("x"), py::arg("threads") = 0,
        "Add the rows of x to a state, its counts included, in place. Returns -1, or the index of the first "
        "row "
        "that isn't finite.");
  m.def("fold_moments", &fold, py::arg("counts"), py::arg("mean"), py::arg("scatter"), py::arg("waiting"),
        py::arg("centered"), py::arg("threads") = 0, "Fold the waiting rows into a state, in place.");
  m.def("first_bad_row", &first_bad, py::arg("x"), py::arg("threads") = 0,
        "The index of the first row that update_moments would refuse, or -1.");
  m.def("center_rows", &center, py::arg("x"), py::arg("centered"), py::arg("mean"), py::arg("out"),
        py::arg("threads") = 0,
        "Write the mean of the rows, and the rows minus that mean; return the sum of squares of the latter.");
  m.def("symmetric_moments", &symmetric, py::arg("counts"), py::arg("mean"), py::arg("scatter"),
        py::arg("waiting"), py::arg("centered"), py::arg("out"), py::arg("threads") = 0,
        "Write scatter / count, both triangles, to out.");
  m.def("block_rows", [] { return kBlockRows; }, "The number of rows that are folded in as one block.");
  const auto def = [&m](const char* name, auto* f, const char* doc) {
    m.def(name, f, py::arg("counts"), py::arg("mean"), py::arg("scatter"), py::arg("waiting"),
          py::arg("centered"), py::arg("other_counts"), py::arg("other_mean"), py::arg("other_scatter"),
          py::arg("other_waiting"), py::arg("threads") = 0, doc);
  };
  def("merge_moments", &combine<merge_moments>,
      "Add the rows that another state has seen to a state, in place.");
  def("subtract_moments", &combine<subtract_moments>,
      "Remove the rows that another state has seen from a state, in place.");
}

}  // namespace scalpel::bindings
