#include "bindings/arrays.h"

#include <stdexcept>

namespace scalpel::bindings {
namespace py = pybind11;
namespace {

DType dtype_of(const std::string& name) {
  for (DType d : {DType::kFloat32, DType::kFloat64, DType::kBool, DType::kInt64, DType::kBFloat16,
                  DType::kFloat16, DType::kInt32}) {
    if (name == name_of(d)) return d;
  }
  throw DTypeError("dtype is " + name +
                   "; the core knows bool, int32, int64, float16, bfloat16, float32 and float64");
}

}  // namespace

TensorView view_of(const ArrayTuple& array) {
  if (array.size() != 4) throw std::invalid_argument("an array is (address, dtype, shape, strides)");
  TensorView view;
  view.data = reinterpret_cast<void*>(array[0].cast<std::uintptr_t>());
  view.dtype = dtype_of(array[1].cast<std::string>());
  const auto shape = array[2].cast<py::tuple>();
  const auto strides = array[3].cast<py::tuple>();
  if (shape.size() > TensorView::kMaxDims || strides.size() != shape.size()) {
    throw std::invalid_argument("an array has " + std::to_string(shape.size()) + " dimensions and " +
                                std::to_string(strides.size()) + " strides; at most " +
                                std::to_string(TensorView::kMaxDims) +
                                " of each are allowed, and the two numbers must be equal");
  }
  view.ndim = static_cast<int>(shape.size());
  for (int i = 0; i < view.ndim; ++i) {
    view.shape[i] = shape[i].cast<std::int64_t>();
    view.strides[i] = strides[i].cast<std::int64_t>();
  }
  return view;
}

}  // namespace scalpel::bindings
