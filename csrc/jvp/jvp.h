// Tangents and cotangents of a transformer's sublayers, sixteen at a time: the contract of every target.
//
// A *lanes* array holds one value's tangents: (tokens, entries, 16), the sixteen tangents of an entry side by
// side, so that one weight is broadcast to all of them. `index` (tokens, entries), int64 and ascending in
// every row, says which channel an entry is; all other channels of that token have tangent zero, or are not
// wanted. An absent index (a view without data) means that entry c is channel c. float32 and float64;
// accumulated in the dtype of the arrays; everything contiguous.
//
// Each rule is the derivative at a primal that is given; what a TopK or ReLU keeps there is what the indices
// list. The transposed rules (vjp) are the exact adjoints of the forward ones (jvp), up to rounding.
//
// Errors: std::invalid_argument that names what was given and what is allowed (DTypeError for a dtype);
// nothing is written then. Thread-safe. `threads` is the most threads to use, 0 for OpenMP's own choice. The
// result is the same for any number of threads, and may differ in rounding from target to target.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor_view.h"

namespace scalpel {

constexpr int kTangentLanes = 16;

// A sparse matrix in compressed rows: row r has columns[starts[r] : starts[r + 1]], ascending.
struct SparseMatrix {
  TensorView starts;   // (rows + 1,) int64
  TensorView columns;  // (non-zeros,) int32
  TensorView weights;  // (non-zeros,)
  std::int64_t cols = 0;
  std::int64_t rows() const { return starts.shape[0] - 1; }
};

// out[n, e] = scale[n, e] * sum over c of weight[out channel, c] * in[n, c], and only where out lists it.
// jvp of a linear layer; with the transposed matrix its vjp. scale (tokens, entries of out) may be absent. A
// channel that `in` lists twice: the last one counts.
void linear_lanes(const SparseMatrix& weight, const TensorView& in, const TensorView& in_index,
                  const TensorView& scale, const TensorView& out, const TensorView& out_index,
                  int threads = 0);

// The layer itself: out (tokens, rows) = x (tokens, cols) times the transposed matrix, plus bias (rows,),
// which may be absent.
void linear_rows(const SparseMatrix& weight, const TensorView& x, const TensorView& bias,
                 const TensorView& out, int threads = 0);

// Tangents as rows, (T, tokens, channels) with T <= 16, to lanes of all channels, zero beyond T; and back.
void rows_to_lanes(const TensorView& rows, const TensorView& lanes, int threads = 0);
void lanes_to_rows(const TensorView& lanes, const TensorView& rows, int threads = 0);

// The primal of RMSNorm or LayerNorm: y = gain * normed (+ bias), normed = (x - mean) * rate.
struct Norm {
  TensorView normed;  // (tokens, width)
  TensorView rate;    // (tokens,) 1 / deviation, or 1 / root mean square
  TensorView gain;    // (width,)
  bool centred;       // LayerNorm; RMSNorm has no mean
  std::int64_t over;  // how many channels the means are over: those behind have gain and normed zero
};

// out[n, e] = gain * rate * (in - mean(in) - normed * mean(normed * in)) at out's channels; in has no index.
// (mean(in) for LayerNorm only: Xu et al. 2019, "Understanding and Improving Layer Normalization", eq. 6.)
void norm_jvp(const Norm& norm, const TensorView& in, const TensorView& out, const TensorView& out_index,
              int threads = 0);
// The adjoint, added to out, which has no index.
void norm_vjp(const Norm& norm, const TensorView& in, const TensorView& in_index, const TensorView& out,
              int threads = 0);

// out[n, e] = in[n, channel of e]; and out[n, channel of e] += in[n, e].
void gather_lanes(const TensorView& in, const TensorView& out, const TensorView& index, int threads = 0);
void scatter_lanes(const TensorView& in, const TensorView& index, const TensorView& out, int threads = 0);

// The primal of causal attention. Heads lie side by side in a row; head h of q reads head h * kv_heads /
// heads of k and v. y is what the layer gave.
struct Attention {
  TensorView q, k, v, y;  // (batch, length, heads * d), k and v (batch, length, kv_heads * d)
  TensorView allowed;     // (1 or batch, length, length) bool: the keys that a query may read
  TensorView sink;        // (heads,) the logit of a slot of value zero; may be absent
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  double scale = 0;  // of the scores
};

struct LanesOf {
  TensorView lanes;  // without data: all zero
  TensorView index;
};

// Tangents of y (no index) from those of q, k and v. No array of length x length: each thread holds the
// weights of eight queries of one head, and a copy of that head's k and v and of their lanes.
void attention_jvp(const Attention& at, const LanesOf& q, const LanesOf& k, const LanesOf& v,
                   const TensorView& y, int threads = 0);
// Cotangents of q, k and v at their indices from those of y (no index).
void attention_vjp(const Attention& at, const TensorView& y, const LanesOf& q, const LanesOf& k,
                   const LanesOf& v, int threads = 0);

// For tests, as topk_compiled_for and topk_calls.
const char* jvp_compiled_for(Target target);
std::uint64_t jvp_calls(Target target);

}  // namespace scalpel
