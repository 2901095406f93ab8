// Folds one block of rows into a state. Internal: shared by moments.cpp and block.cpp.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "covariance/covariance.h"
#include "covariance/kernel.h"

namespace scalpel {

// Rows of one dtype; consecutive rows are `stride` elements apart.
struct Rows {
  const void* data;
  std::int64_t stride;
  std::int64_t count;
  DType dtype;

  Rows from(std::int64_t first, std::int64_t most) const {
    const auto* bytes = static_cast<const char*>(data) + first * stride * item_size(dtype);
    return {bytes, stride, count - first < most ? count - first : most, dtype};
  }
};

const CovarianceKernels& active_covariance_kernels();
const RowKernels& kernels_for(const CovarianceKernels& kernels, DType dtype);

// The index of the first row with an entry that is NaN, infinite or too large, or -1.
std::int64_t first_bad_row(const Rows& rows, std::int64_t dim, int threads);

// Computes the mean of the rows in float64. The rows are shifted by the first of them, so that the mean of a
// column that never varies is exactly its value. Returns a bound on |x - mean|, or on |x| if not centered.
double find_mean(const Rows& rows, std::int64_t dim, bool centered, double* mean, int threads);

// Folds at most kBlockRows rows, all of them finite, into the state.
void add_block(Moments& state, const Rows& rows, int threads);

}  // namespace scalpel
