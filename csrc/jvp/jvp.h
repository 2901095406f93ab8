// Tangents and cotangents of a transformer's sublayers, sixteen at a time: the contract of every target.
//
// A *lanes* array holds the tangents of one value, as (tokens, entries, 16): the sixteen tangents of an
// entry lie side by side, so that one weight is broadcast to all of them. `index` (tokens, entries), int64
// and ascending in every row, gives the channel of each entry. The tangents of all other channels of that
// token are zero if the array is an input, and are not computed if it is an output. Without an index (a view
// without data), entry c is channel c. All arrays are contiguous, float32 or float64, and sums are
// accumulated in the dtype of the arrays.
//
// Each rule is the derivative at a given primal; the indices list what a TopK or ReLU keeps there. The
// transposed rules (vjp) are the exact adjoints of the forward ones (jvp), up to rounding. NaN and infinity
// get no special treatment: a non-finite weight times the zero tangent of an unlisted channel is NaN.
// Attention alone may skip products with a primal entry that is exactly zero.
//
// Errors: std::invalid_argument that names what was given and what is allowed (DTypeError for a dtype);
// nothing has been written then. Thread-safe. `threads` is the largest number of threads to use, 0 for
// OpenMP's own choice. The result does not depend on the number of threads, but its rounding may differ
// between targets.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor_view.h"

namespace scalpel {

constexpr int kTangentLanes = 16;

// A sparse matrix in compressed sparse row format: the columns of row r are columns[starts[r] : starts[r +
// 1]], in ascending order.
struct SparseMatrix {
  TensorView starts;   // (rows + 1,) int64
  TensorView columns;  // (non-zeros,) int32
  TensorView weights;  // (non-zeros,)
  std::int64_t cols = 0;
  std::int64_t rows() const { return starts.shape[0] - 1; }
};

// out[n, e] = scale[n, e] * sum over c of weight[channel of e, c] * in[n, c], for the channels that out
// lists. This is the jvp of a linear layer, and its vjp when given the transposed matrix. scale (tokens,
// entries of out) may be absent. If `in` lists a channel twice, the last entry counts.
void linear_lanes(const SparseMatrix& weight, const TensorView& in, const TensorView& in_index,
                  const TensorView& scale, const TensorView& out, const TensorView& out_index,
                  int threads = 0);

// The layer itself: out (tokens, rows) = x (tokens, cols) times the transposed matrix, plus bias (rows,).
// The bias may be absent.
void linear_rows(const SparseMatrix& weight, const TensorView& x, const TensorView& bias,
                 const TensorView& out, int threads = 0);

// Converts tangents stored as rows, (T, tokens, channels) with T <= 16, to lanes of all channels, zero
// beyond T; and back.
void rows_to_lanes(const TensorView& rows, const TensorView& lanes, int threads = 0);
void lanes_to_rows(const TensorView& lanes, const TensorView& rows, int threads = 0);

// The primal of RMSNorm or LayerNorm: y = gain * normed (+ bias), where normed = (x - mean) * rate.
struct Norm {
  TensorView normed;  // (tokens, width)
  TensorView rate;    // (tokens,) 1 / standard deviation (LayerNorm) or 1 / root mean square (RMSNorm)
  TensorView gain;    // (width,)
  bool centred;       // true for LayerNorm, false for RMSNorm, which subtracts no mean
  std::int64_t over;  // number of channels averaged over; later ones have zero gain and normed
};

// out[n, e] = gain * rate * (in - mean(in) - normed * mean(normed * in)) at out's channels; `in` has no
// index. The term mean(in) belongs to LayerNorm only. (Xu et al. 2019, "Understanding and Improving Layer
// Normalization", eq. 6.)
void norm_jvp(const Norm& norm, const TensorView& in, const TensorView& out, const TensorView& out_index,
              int threads = 0);
// The adjoint of norm_jvp. The result is added to out, which has no index.
void norm_vjp(const Norm& norm, const TensorView& in, const TensorView& in_index, const TensorView& out,
              int threads = 0);

// gather: out[n, e] = in[n, channel of e]. scatter: out[n, channel of e] += in[n, e].
void gather_lanes(const TensorView& in, const TensorView& out, const TensorView& index, int threads = 0);
void scatter_lanes(const TensorView& in, const TensorView& index, const TensorView& out, int threads = 0);

// The primal of causal attention. The heads lie side by side in a row; head h of q reads head h * kv_heads /
// heads of k and v. y is the layer's output.
struct Attention {
  TensorView q, k, v, y;  // (batch, length, heads * d), k and v (batch, length, kv_heads * d)
  TensorView allowed;     // (1 or batch, length, length) bool: true where a query may read a key
  TensorView sink;        // (heads,) the logit of an extra slot whose value is zero; may be absent
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  double scale = 0;  // multiplies the scores
};

struct LanesOf {
  TensorView lanes;  // without data: all tangents are zero
  TensorView index;
};

// Tangents of y (no index) from those of q, k and v. No array of length x length is allocated: each thread
// holds the attention weights of eight queries of one head, and a copy of that head's k and v and of their
// lanes.
void attention_jvp(const Attention& at, const LanesOf& q, const LanesOf& k, const LanesOf& v,
                   const TensorView& y, int threads = 0);
// Cotangents of q, k and v, at the channels of their indices, from those of y (no index).
void attention_vjp(const Attention& at, const TensorView& y, const LanesOf& q, const LanesOf& k,
                   const LanesOf& v, int threads = 0);

// For tests; see topk_compiled_for and topk_calls in topk.h.
const char* jvp_compiled_for(Target target);
std::uint64_t jvp_calls(Target target);

}  // namespace scalpel
