// The interface between the drivers (jvp.cpp, rows.cpp, attention.cpp) and the targets' files. Internal: the
// kernels take raw pointers and sizes, because the drivers have already checked everything. Real is float or
// double.
#pragma once

#include <cstdint>

namespace scalpel {

// A (tokens, entries, 16) array and the channels of its entries. Without an index (nullptr), entry c is
// channel c.
template <class Real>
struct LaneRows {
  Real* lanes;
  const std::int64_t* index;
  std::int64_t entries;
};

template <class Real>
struct LinearTask {
  const std::int64_t* starts;
  const std::int32_t* columns;
  const Real* weights;
  std::int64_t cols;
  LaneRows<const Real> in;
  const Real* scale;
  LaneRows<Real> out;
  std::int64_t begin, end;  // tokens
  std::int32_t* offsets;    // scratch: cols
  Real* line;               // scratch: (entries of in + 1) * 16
};

// Sixteen tokens, starting with `first`, and the rows [begin, end) of the matrix.
template <class Real>
struct LinearRowsTask {
  const std::int64_t* starts;
  const std::int32_t* columns;
  const Real* weights;
  const Real* bias;  // or nullptr
  std::int64_t rows, cols, tokens;
  const Real* x;
  Real* out;
  std::int64_t first, begin, end;
  Real* line;  // scratch: cols * 16
};

// Rows of shape (count, tokens, channels), and lanes of all channels.
template <class Real>
struct TurnTask {
  Real* rows;
  Real* lanes;
  std::int64_t count, tokens, channels;
  std::int64_t begin, end;  // tokens
};

template <class Real>
struct NormTask {
  const Real* normed;
  const Real* rate;
  const Real* gain;
  bool centred;
  std::int64_t over;
  std::int64_t width;
  LaneRows<const Real> in;
  LaneRows<Real> out;
  std::int64_t begin, end;
};

template <class Real>
struct CopyTask {
  LaneRows<const Real> in;
  LaneRows<Real> out;
  std::int64_t begin, end;
};

constexpr int kQueryTile = 8;

// The entries of a token that belong to one head: their lanes, their channels, and how many there are.
template <class Real>
struct HeadEntries {
  Real* lanes;
  const std::int64_t* channels;  // channels within the token's row; nullptr: all channels of the head
  std::int64_t first;            // the head's first channel, to subtract from `channels`
  std::int64_t count;
};

// One head of q, and the head of k and v that it reads.
template <class Real>
struct AttentionTask {
  const Real *q, *k, *v, *y;   // the head's first channel at token 0
  std::int64_t q_row, kv_row;  // elements from token to token
  std::int64_t length, d;
  const std::uint8_t* allowed;  // (length, length)
  const Real* sink;             // the head's logit, or nullptr
  Real scale;
  const HeadEntries<Real>* dq;  // (length,) each; inputs of the jvp, outputs of the vjp
  const HeadEntries<Real>* dk;
  const HeadEntries<Real>* dv;
  Real* dy;  // the head's first lane at token 0; tokens are y_row * 16 apart
  std::int64_t y_row;
  std::int64_t begin, end;  // queries
  Real* scratch;            // attention_scratch()
  std::uint16_t* nonzero;
};

// The number of elements of scratch: the transposed keys, the weights and queries of a tile, two blocks of
// (d, 16) for each query of a tile, and the head's k and v with their entries. `nonzero` lists channels; see
// Packed in attention.inc.
constexpr std::int64_t attention_scratch(std::int64_t length, std::int64_t d) {
  const std::int64_t padded = (length + 15) / 16 * 16;
  return d * padded + kQueryTile * padded + kQueryTile * d + 2 * kQueryTile * d * 16 + 2 * length * d * 17;
}
constexpr std::int64_t attention_nonzero(std::int64_t length, std::int64_t d) { return 4 * length * (d + 1); }

template <class Real>
struct JvpKernelsOf {
  void (*linear)(const LinearTask<Real>&);
  void (*linear_rows)(const LinearRowsTask<Real>&);
  void (*rows_to_lanes)(const TurnTask<Real>&);
  void (*lanes_to_rows)(const TurnTask<Real>&);
  void (*norm_jvp)(const NormTask<Real>&);
  void (*norm_vjp)(const NormTask<Real>&);
  void (*gather)(const CopyTask<Real>&);
  void (*scatter)(const CopyTask<Real>&);
  void (*attention_jvp)(const AttentionTask<Real>&);
  void (*attention_vjp)(const AttentionTask<Real>&);
};

struct JvpKernels {
  const char* compiled_for;
  std::uint64_t* calls;
  JvpKernelsOf<float> f32;
  JvpKernelsOf<double> f64;
};

const JvpKernels& jvp_portable();
const JvpKernels& jvp_avx2();
const JvpKernels& jvp_avx512();

}  // namespace scalpel
