// Binds the tangent and cotangent rules of jvp.h, for the CPU and the GPU alike.
#include "bindings/arrays.h"
#include "bindings/place.h"

namespace scalpel::bindings {
namespace py = pybind11;
namespace {

// None becomes a view without data or dimensions, which the ops treat as absent.
TensorView view_or_none(const py::object& array) {
  return array.is_none() ? TensorView{.ndim = 0} : view_of(array.cast<ArrayTuple>());
}

LanesOf lanes_of(const py::object& lanes, const py::object& index) {
  return {view_or_none(lanes), view_or_none(index)};
}

SparseMatrix matrix_of(const ArrayTuple& starts, const ArrayTuple& columns, const ArrayTuple& weights,
                       std::int64_t cols) {
  SparseMatrix matrix;
  matrix.starts = view_of(starts);
  matrix.columns = view_of(columns);
  matrix.weights = view_of(weights);
  matrix.cols = cols;
  return matrix;
}

void linear(const ArrayTuple& starts, const ArrayTuple& columns, const ArrayTuple& weights, std::int64_t cols,
            const ArrayTuple& x, const py::object& x_index, const py::object& scale, const ArrayTuple& out,
            const py::object& out_index, const Place& where) {
  const SparseMatrix matrix = matrix_of(starts, columns, weights, cols);
  const TensorView in = view_of(x);
  const TensorView in_index = view_or_none(x_index);
  const TensorView scales = view_or_none(scale);
  const TensorView to = view_of(out);
  const TensorView to_index = view_or_none(out_index);
  const py::gil_scoped_release release;
  ops::linear_lanes(matrix, in, in_index, scales, to, to_index, run_at(where));
}

void layer(const ArrayTuple& starts, const ArrayTuple& columns, const ArrayTuple& weights, std::int64_t cols,
           const ArrayTuple& x, const py::object& bias, const ArrayTuple& out, const Place& where) {
  const SparseMatrix matrix = matrix_of(starts, columns, weights, cols);
  const TensorView in = view_of(x);
  const TensorView added = view_or_none(bias);
  const TensorView to = view_of(out);
  const py::gil_scoped_release release;
  ops::linear_rows(matrix, in, added, to, run_at(where));
}

template <void (*turn)(const TensorView&, const TensorView&, At)>
void turned(const ArrayTuple& from, const ArrayTuple& to, const Place& where) {
  const TensorView in = view_of(from);
  const TensorView out = view_of(to);
  const py::gil_scoped_release release;
  turn(in, out, run_at(where));
}

Norm norm_of(const ArrayTuple& normed, const ArrayTuple& rate, const ArrayTuple& gain, bool centred,
             std::int64_t over) {
  return {view_of(normed), view_of(rate), view_of(gain), centred, over};
}

void norm_forward(const ArrayTuple& normed, const ArrayTuple& rate, const ArrayTuple& gain, bool centred,
                  std::int64_t over, const ArrayTuple& x, const ArrayTuple& out, const py::object& out_index,
                  const Place& where) {
  const Norm norm = norm_of(normed, rate, gain, centred, over);
  const TensorView in = view_of(x);
  const TensorView to = view_of(out);
  const TensorView to_index = view_or_none(out_index);
  const py::gil_scoped_release release;
  ops::norm_jvp(norm, in, to, to_index, run_at(where));
}

void norm_backward(const ArrayTuple& normed, const ArrayTuple& rate, const ArrayTuple& gain, bool centred,
                   std::int64_t over, const ArrayTuple& x, const py::object& x_index, const ArrayTuple& out,
                   const Place& where) {
  const Norm norm = norm_of(normed, rate, gain, centred, over);
  const TensorView in = view_of(x);
  const TensorView in_index = view_or_none(x_index);
  const TensorView to = view_of(out);
  const py::gil_scoped_release release;
  ops::norm_vjp(norm, in, in_index, to, run_at(where));
}

void gather(const ArrayTuple& x, const ArrayTuple& out, const ArrayTuple& index, const Place& where) {
  const TensorView in = view_of(x);
  const TensorView to = view_of(out);
  const TensorView channels = view_of(index);
  const py::gil_scoped_release release;
  ops::gather_lanes(in, to, channels, run_at(where));
}

void scatter(const ArrayTuple& x, const py::object& index, const ArrayTuple& out, const Place& where) {
  const TensorView in = view_of(x);
  const TensorView channels = view_or_none(index);
  const TensorView to = view_of(out);
  const py::gil_scoped_release release;
  ops::scatter_lanes(in, channels, to, run_at(where));
}

template <bool forward>
void attention(const ArrayTuple& q, const ArrayTuple& k, const ArrayTuple& v, const ArrayTuple& y,
               const ArrayTuple& allowed, const py::object& sink, std::int64_t heads, std::int64_t kv_heads,
               double scale, const py::object& dq, const py::object& dq_index, const py::object& dk,
               const py::object& dk_index, const py::object& dv, const py::object& dv_index,
               const ArrayTuple& dy, const Place& where) {
  Attention at;
  at.q = view_of(q);
  at.k = view_of(k);
  at.v = view_of(v);
  at.y = view_of(y);
  at.allowed = view_of(allowed);
  at.sink = view_or_none(sink);
  at.heads = heads;
  at.kv_heads = kv_heads;
  at.scale = scale;
  const LanesOf of_q = lanes_of(dq, dq_index);
  const LanesOf of_k = lanes_of(dk, dk_index);
  const LanesOf of_v = lanes_of(dv, dv_index);
  const TensorView of_y = view_of(dy);
  const py::gil_scoped_release release;
  if (forward) {
    ops::attention_jvp(at, of_q, of_k, of_v, of_y, run_at(where));
  } else {
    ops::attention_vjp(at, of_y, of_q, of_k, of_v, run_at(where));
  }
}

}  // namespace

void init_jvp(py::module_& m) {
  using py::arg;
  m.def(
      "tangent_lanes", [] { return kTangentLanes; },
      "The number of tangents that lie side by side in lanes.");
  m.def("linear_lanes", &linear, arg("starts"), arg("columns"), arg("weights"), arg("cols"), arg("x"),
        arg("x_index"), arg("scale"), arg("out"), arg("out_index"), place(),
        "A sparse matrix, in compressed rows, times lanes. Indices and scale may be None.");
  m.def("linear_rows", &layer, arg("starts"), arg("columns"), arg("weights"), arg("cols"), arg("x"),
        arg("bias"), arg("out"), place(),
        "Rows times the transposed sparse matrix, plus a bias, which may be None.");
  m.def("rows_to_lanes", &turned<ops::rows_to_lanes>, arg("rows"), arg("lanes"), place(),
        "Convert tangents stored as rows to lanes.");
  m.def("lanes_to_rows", &turned<ops::lanes_to_rows>, arg("lanes"), arg("rows"), place(),
        "Convert lanes to tangents stored as rows.");
  m.def("norm_jvp", &norm_forward, arg("normed"), arg("rate"), arg("gain"), arg("centred"), arg("over"),
        arg("x"), arg("out"), arg("out_index"), place(), "Tangents of RMSNorm or (centred) LayerNorm.");
  m.def("norm_vjp", &norm_backward, arg("normed"), arg("rate"), arg("gain"), arg("centred"), arg("over"),
        arg("x"), arg("x_index"), arg("out"), place(),
        "Cotangents of RMSNorm or (centred) LayerNorm, added to out.");
  m.def("gather_lanes", &gather, arg("x"), arg("out"), arg("index"), place(), "Copy the listed channels.");
  m.def("scatter_lanes", &scatter, arg("x"), arg("index"), arg("out"), place(),
        "Add each entry to its channel.");
  const auto def = [&m](const char* name, auto* f, const char* doc) {
    m.def(name, f, arg("q"), arg("k"), arg("v"), arg("y"), arg("allowed"), arg("sink"), arg("heads"),
          arg("kv_heads"), arg("scale"), arg("dq"), arg("dq_index"), arg("dk"), arg("dk_index"), arg("dv"),
          arg("dv_index"), arg("dy"), place(), doc);
  };
  def("attention_jvp", &attention<true>, "Tangents of attention's output; those of q, k and v may be None.");
  def("attention_vjp", &attention<false>, "Cotangents of q, k and v from those of the output.");
}

}  // namespace scalpel::bindings
