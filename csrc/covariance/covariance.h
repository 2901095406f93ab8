// Streaming moments: count, mean and scatter of rows, in float64, from batches of any size.
//
//   x        (rows, dim)  float16, bfloat16, float32 or float64; last stride 1, any row stride
//   mean     (dim,)       float64
//   scatter  (dim, dim)   float64, row-major; only the lower triangle (column <= row) is read or written
//
// Centered:   scatter = sum over rows of (x - mean)(x - mean)^T.   Uncentered: scatter = sum of x x^T.
// The covariance is scatter / count; it is the caller's to divide and to mirror.
//
// Update. Within a batch, the rows are centred by the batch's own mean (itself computed from rows shifted by
// the running mean, or by the first row of a first batch, so a column that never varies has a scatter of
// exactly 0). The batch joins the state by the pairwise rule of Chan, Golub & LeVeque 1979 ("Updating
// formulae and a pairwise algorithm for computing sample variances", eq. 2.1), for covariances Pebay 2008
// (SAND2008-6212, eq. 3.10 ff.):
//   d = mean_b - mean_a,  n = n_a + n_b
//   scatter = scatter_a + scatter_b + d d^T n_a n_b / n,   mean = mean_a + d n_b / n
// Every product and sum is float64, also for narrower x.
//
// The bits don't depend on the number of threads: each entry is summed in the order of the rows. They do
// depend on the target (fused multiply-add) and on how the rows are cut into batches, to rounding.
//
// Errors: std::invalid_argument (DTypeError for a dtype). Zero rows change nothing. A row with a NaN or an
// infinity is reported by its index and the state is left as it was. Two updates of one state at once are the
// caller's to prevent.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor_view.h"

namespace scalpel {

struct Moments {
  std::int64_t count;
  std::int64_t dim;
  double* mean;
  double* scatter;
  bool centered;
};

// Adds the rows of x to state. Returns -1, or the index of the first row that isn't finite, in which case the
// state is unchanged. `threads` is the most threads to use, 0 for OpenMP's own choice.
std::int64_t update_moments(Moments& state, const TensorView& x, int threads = 0);

// Adds the rows behind `other` to state, by the rule above.
void merge_moments(Moments& state, const Moments& other, int threads = 0);

// Takes them out again; they must be among the rows of state. What cancels is lost: the error is relative to
// the larger scatter.
void subtract_moments(Moments& state, const Moments& other, int threads = 0);

// For tests, as for TopK: the target that a copy of the kernel was compiled for, and its calls so far.
const char* covariance_compiled_for(Target target);
std::uint64_t covariance_calls(Target target);

}  // namespace scalpel
