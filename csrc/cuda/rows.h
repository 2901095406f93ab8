// Locates the rows of a strided tensor inside a kernel. The number of dimensions is bounded, so that the
// description fits a kernel's arguments.
#pragma once

#include <stdexcept>
#include <string>

#include "../core/tensor_view.h"
#include "device.h"

namespace scalpel::device {

constexpr int kMaxRowDims = 8;

// The leading dimensions of a tensor; neighbouring dimensions that form one uniform stride are merged.
struct Rows {
  int dims = 0;
  std::int64_t shape[kMaxRowDims];
  std::int64_t strides[kMaxRowDims];

  // The offset of row r, in elements.
  __host__ __device__ std::int64_t offset(std::int64_t r) const {
    std::int64_t found = 0;
    for (int i = dims - 1; i > 0; --i) {
      found += r % shape[i] * strides[i];
      r /= shape[i];
    }
    return dims > 0 ? found + r * strides[0] : 0;
  }
};

inline Rows rows_of(const TensorView& view, const char* name) {
  Rows rows;
  for (int i = 0; i + 1 < view.ndim; ++i) {
    if (view.shape[i] == 1) continue;
    const int last = rows.dims - 1;
    if (last >= 0 && rows.strides[last] == view.strides[i] * view.shape[i]) {
      rows.shape[last] *= view.shape[i];
      rows.strides[last] = view.strides[i];
      continue;
    }
    if (rows.dims == kMaxRowDims) {
      throw std::invalid_argument(std::string(name) + " has more than " + std::to_string(kMaxRowDims) +
                                  " leading dimensions whose strides cannot be merged; call .contiguous()");
    }
    rows.shape[rows.dims] = view.shape[i];
    rows.strides[rows.dims] = view.strides[i];
    ++rows.dims;
  }
  return rows;
}

}  // namespace scalpel::device
