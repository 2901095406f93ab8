// Streaming moments: count, mean and scatter of rows, in float64, from batches of any size.
//
//   x        (rows, dim)  float16, bfloat16, float32 or float64; last stride 1, any row stride
//   mean     (dim,)       float64
//   scatter  (dim, dim)   float64, row-major; only the lower triangle (column <= row) is read or written
//
// Centered:   scatter = sum over rows of (x - mean)(x - mean)^T.   Uncentered: scatter = sum of x x^T.
// The covariance is scatter / count; it is the caller's to divide and to mirror.
//
// Update. Rows wait until there is a block of kBlockRows of them, which then joins the state as one, so that
// the state is read and written once a block, and the bits don't depend on how rows were cut into updates (of
// one dtype). A new state of more columns than that keeps its rows until there are as many as columns: until
// then their Gram matrix is the smaller one. Within a block the rows are centred by the block's own mean
// (itself computed from rows shifted by the block's first, so a column that never varies has a scatter of
// exactly 0). The block joins the state by the pairwise rule of Chan, Golub & LeVeque 1979 ("Updating
// formulae and a pairwise algorithm for computing sample variances", eq. 2.1), for covariances Pebay 2008
// (SAND2008-6212, eq. 3.10 ff.):
//   d = mean_b - mean_a,  n = n_a + n_b
//   scatter = scatter_a + scatter_b + d d^T n_a n_b / n,   mean = mean_a + d n_b / n
// Means are float64. Rows are centred in float64; products of float64 rows are float64, those of narrower
// ones float32, over at most 128 rows, and these sums are then added in float64 (of a block whose deviations
// float32 could not square, float64).
//
// The bits don't depend on the number of threads: each entry is summed in the order of the rows. They do
// depend on the target (vector width leaves the order alone, fused multiply-add does not leave the rounding),
// and on when waiting rows were made to join, to rounding.
//
// Errors: std::invalid_argument (DTypeError for a dtype). Zero rows change nothing. A row with a NaN or an
// infinity is reported by its index and the state is left as it was. Two updates of one state at once are the
// caller's to prevent.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor_view.h"

namespace scalpel {

// What joined so far; a state without rows may do without a scatter.
struct Moments {
  std::int64_t count;
  std::int64_t dim;
  double* mean;
  double* scatter;
  bool centered;
};

// Rows that wait: `filled` of `capacity`, contiguous, of the state's dim, all finite.
struct Waiting {
  void* data;
  std::int64_t capacity;
  std::int64_t filled;
  DType dtype;
};

inline constexpr std::int64_t kBlockRows = 1024;

// When so many rows wait, blocks join.
std::int64_t waiting_limit(const Moments& state);

// Adds the rows of x to the waiting ones, and whole blocks of these to state. Returns -1, or the index of the
// first row that isn't finite, in which case nothing is changed. There must be room for all the rows that
// would wait; from the limit on for a block, and then state needs its scatter. `threads` is the most threads
// to use, 0 for OpenMP's own choice.
std::int64_t update_moments(Moments& state, Waiting& waiting, const TensorView& x, int threads = 0);

// Of rows x (rows, dim), at least one, all finite: their mean (dim,) in float64; out (rows, dim), contiguous,
// the rows less that mean (uncentered: as they are), float64 of a float64 x, else float32. Returns the sum of
// squares of out.
double center_rows(const TensorView& x, bool centered, const TensorView& mean, const TensorView& out,
                   int threads = 0);

// The index of the first row of x (rows, dim) with an entry that update_moments would refuse, or -1.
std::int64_t bad_row(const TensorView& x, int threads = 0);

// All waiting rows join, as blocks and what is left.
void fold_moments(Moments& state, Waiting& waiting, int threads = 0);

// out (dim, dim), float32 or float64, contiguous: scatter / count, the upper triangle too. state has rows,
// none of which wait.
void symmetric_moments(const Moments& state, const TensorView& out, int threads = 0);

// Adds the rows behind `other` to state, by the rule above. Rows that wait are the caller's to fold before.
void merge_moments(Moments& state, const Moments& other, int threads = 0);

// Takes them out again; they must be among the rows of state. What cancels is lost: the error is relative to
// the larger scatter.
void subtract_moments(Moments& state, const Moments& other, int threads = 0);

// For tests, as for TopK: the target that a copy of the kernel was compiled for, and its calls so far.
const char* covariance_compiled_for(Target target);
std::uint64_t covariance_calls(Target target);

}  // namespace scalpel
