// One block of rows joins a state. Internal.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "covariance/covariance.h"
#include "covariance/kernel.h"

namespace scalpel {

// Of one dtype, `stride` elements from one to the next.
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

// The index of the first row with an entry that is not finite or too large, or -1.
std::int64_t first_bad_row(const Rows& rows, std::int64_t dim, int threads);

// The mean of the rows, float64, from rows shifted by the first of them, so that a column that never varies
// has its own value as its mean. Returns a bound on |x - mean|, or on |x| if not centered.
double find_mean(const Rows& rows, std::int64_t dim, bool centered, double* mean, int threads);

// At most kBlockRows rows, all finite, join the state.
void add_block(Moments& state, const Rows& rows, int threads);

}  // namespace scalpel
