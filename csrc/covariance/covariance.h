// Streaming moments: count, mean and scatter of rows, accumulated in float64 from batches of any size.
//
//   x        (rows, dim)  float16, bfloat16, float32 or float64; last stride 1, any row stride
//   mean     (dim,)       float64
//   scatter  (dim, dim)   float64, row-major; only the lower triangle (column <= row) is read or written
//
// Centered:   scatter = sum over rows of (x - mean)(x - mean)^T.   Uncentered: scatter = sum of x x^T. The
// covariance is scatter / count; the caller divides and mirrors it, or calls symmetric_moments.
//
// Update. Rows wait until there are kBlockRows of them, which are then folded into the state as one block.
// The state is thus read and written only once per block, and the bits do not depend on how the rows were
// divided into updates, provided they all have one dtype. A new state with more than kBlockRows columns
// keeps its rows waiting until there are as many as columns, because until then their Gram matrix is the
// smaller matrix. Within a block the rows are centered by the block's own mean, which is computed from rows
// shifted by the block's first row, so that a column that never varies has a scatter of exactly 0. The block
// is folded in by the pairwise rule of Chan, Golub & LeVeque 1979 ("Updating formulae and a pairwise
// algorithm for computing sample variances", eq. 2.1); for covariances see Pebay 2008 (SAND2008-6212, eq.
// 3.10 ff.):
//   d = mean_b - mean_a,  n = n_a + n_b
//   scatter = scatter_a + scatter_b + d d^T n_a n_b / n,   mean = mean_a + d n_b / n
//
// Accumulators. Means are float64, and rows are centered in float64. Products of float64 rows are computed
// in float64. Products of narrower rows are computed in float32 and summed in float32 over at most 128 rows;
// these sums are then added in float64. A block whose deviations are too large or too small for float32
// squares uses float64 throughout.
//
// The bits do not depend on the number of threads, because each entry is summed in the order of the rows.
// They do depend on the target, because fused multiply-add changes the rounding (the vector width does not
// change the order). They also depend, up to rounding, on when waiting rows were folded in.
//
// Errors: std::invalid_argument (DTypeError for a dtype). An x without rows changes nothing. A row with a
// NaN, an infinity, or an entry beyond 1e150 in size is reported by its index, and the state is left as it
// was. The caller must prevent two simultaneous updates of one state.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor_view.h"

namespace scalpel {

// What has been folded in so far. A state without rows may have no scatter (nullptr).
struct Moments {
  std::int64_t count;
  std::int64_t dim;
  double* mean;
  double* scatter;
  bool centered;
};

// Rows that wait to be folded in: `filled` of `capacity` rows, contiguous, as wide as the state, all finite.
struct Waiting {
  void* data;
  std::int64_t capacity;
  std::int64_t filled;
  DType dtype;
};

inline constexpr std::int64_t kBlockRows = 1024;

// The number of waiting rows at which blocks are folded in.
std::int64_t waiting_limit(const Moments& state);

// Adds the rows of x to the waiting rows, and folds whole blocks of them into the state. Returns -1, or the
// index of the first row that is not finite, in which case nothing has changed. `waiting` needs room for all
// rows that will wait; once the limit is reached, it needs room for one block, and the state needs its
// scatter. `threads` is the largest number of threads to use, 0 for OpenMP's own choice.
std::int64_t update_moments(Moments& state, Waiting& waiting, const TensorView& x, int threads = 0);

// For x (rows, dim), with at least one row and only finite entries: writes the mean (dim,) in float64, and
// to out (rows, dim) the rows less that mean, or the rows unchanged if not centered. out is contiguous,
// float64 if x is, otherwise float32. Returns the sum of squares of out.
double center_rows(const TensorView& x, bool centered, const TensorView& mean, const TensorView& out,
                   int threads = 0);

// The index of the first row of x (rows, dim) that update_moments would refuse, or -1.
std::int64_t bad_row(const TensorView& x, int threads = 0);

// Folds all waiting rows into the state, in blocks of kBlockRows and a smaller last one.
void fold_moments(Moments& state, Waiting& waiting, int threads = 0);

// Writes scatter / count with both triangles to out (dim, dim), float32 or float64, contiguous. The state
// must have rows, and none may be waiting.
void symmetric_moments(const Moments& state, const TensorView& out, int threads = 0);

// Adds the rows that `other` has seen to the state, by the rule above. The caller folds waiting rows first.
void merge_moments(Moments& state, const Moments& other, int threads = 0);

// Removes the rows that `other` has seen; they must be among the rows of the state. Cancellation loses
// accuracy: the error is relative to the larger scatter.
void subtract_moments(Moments& state, const Moments& other, int threads = 0);

// For tests; see topk_compiled_for and topk_calls in topk.h.
const char* covariance_compiled_for(Target target);
std::uint64_t covariance_calls(Target target);

}  // namespace scalpel
