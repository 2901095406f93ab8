// Converts the tuples with which Python describes an array into TensorViews. Tuples keep the module free of
// torch and numpy headers; Python guarantees that the memory stays alive during a call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "core/tensor_view.h"

namespace scalpel::bindings {

// (address, dtype name, shape, strides in elements): everything the core needs to know of a tensor or array.
using ArrayTuple = pybind11::tuple;

// Throws std::invalid_argument (ValueError in Python) when the tuple does not have these four parts or has
// more than TensorView::kMaxDims dimensions, and DTypeError (TypeError) for an unknown dtype.
TensorView view_of(const ArrayTuple& array);

void init_core(pybind11::module_& m);
void init_topk(pybind11::module_& m);
void init_covariance(pybind11::module_& m);
void init_jvp(pybind11::module_& m);
void init_covariance_cuda(pybind11::module_& m);

}  // namespace scalpel::bindings
