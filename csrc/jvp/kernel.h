// What jvp.cpp and the files of the targets agree on. Internal; raw pointers only, everything is checked
// before. Real is float or double.
#pragma once

#include <cstdint>

namespace scalpel {

// A (tokens, entries, 16) array and the channels of its entries; index nullptr: entry c is channel c.
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

// Sixteen tokens from `first` on, and the matrix's rows [begin, end).
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

// (count, tokens, channels) and lanes of all channels.
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

// The entries of one head among a token's: their lanes, their channels within the head, and how many.
template <class Real>
struct HeadEntries {
  Real* lanes;
  const std::int64_t* channels;  // nullptr: 0, 1, 2, ...
  std::int64_t first;            // the head's first channel, which `channels` count from 0 of the row
  std::int64_t count;
};

// One head of q and the head of k and v that it reads.
template <class Real>
struct AttentionTask {
  const Real *q, *k, *v, *y;   // the head's first channel at token 0
  std::int64_t q_row, kv_row;  // elements from token to token
  std::int64_t length, d;
  const std::uint8_t* allowed;  // (length, length)
  const Real* sink;             // the head's logit, or nullptr
  Real scale;
  const HeadEntries<Real>* dq;  // (length,) each; for the jvp in, for the vjp out
  const HeadEntries<Real>* dk;
  const HeadEntries<Real>* dv;
  Real* dy;  // the head's first lane at token 0; y_row * 16 from token to token
  std::int64_t y_row;
  std::int64_t begin, end;  // queries
  Real* scratch;            // attention_scratch()
  std::uint16_t* nonzero;
};

// Elements of scratch: keys transposed, the weights and queries of a tile, two blocks of (d, 16) for each of
// its queries, and the head's k, v and their entries side by side. Beside it `nonzero`: channels, see there.
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
