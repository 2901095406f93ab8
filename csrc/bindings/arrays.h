// Arrays of Python as TensorViews.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "core/tensor_view.h"

namespace scalpel::bindings {

// (address, dtype name, shape, strides in elements): all that a tensor or array needs to say about itself.
using ArrayTuple = pybind11::tuple;

// Raises ValueError when the tuple isn't one, names an unknown dtype or has more than TensorView::kMaxDims
// dimensions.
TensorView view_of(const ArrayTuple& array);

void init_core(pybind11::module_& m);
void init_topk(pybind11::module_& m);
void init_covariance(pybind11::module_& m);
void init_jvp(pybind11::module_& m);
void init_covariance_cuda(pybind11::module_& m);

}  // namespace scalpel::bindings
