// Attention on lanes on a GPU. The formulas are those of attention.inc. The design trades some repeated
// arithmetic for never holding an array of length x length.
//
// A single kernel does everything, because jvp and vjp are the same sweep. A block owns a tile of rows of
// one head and up to 64 of their channels, with sixteen lanes each, as sums in its threads' registers. It
// sweeps over the tiles of 16 columns. For each tile it first computes
//   move[r, c] = P[r, c] (lanes of r times a row of c + a row of r times lanes of c - along),
// and then adds move[r, c] times a row of c, and P[r, c] times lanes of c, to the sums:
//   jvp:     rows are queries, columns are keys: dq k + q dk; then move v + P dv, less y sum_c move
//   vjp, q:  rows are queries, columns are keys: u v - u y; then move k
//   vjp, k:  rows are keys, columns are queries: u v - u y; then move q
//   vjp, v:  rows are keys, columns are queries: P u
// A tile in which no query may read a key only costs a look at the mask. For every pair of a query and a key
// with d channels, the jvp takes 64 d multiply-adds and the vjp 80 d. That is 16 d more than necessary,
// because k and q each compute `move` themselves.
//
// No scratch memory is needed. Every sweep recomputes P from q and k, which adds d multiply-adds. A block of
// queries computes the largest score and the sum of its softmax in one more pass over the keys, which adds
// another d. A block of keys needs these statistics of all queries; computing them in the same way would
// double the work at 800 tokens, and cost even more beyond. An earlier kernel therefore writes them into the
// memory of dq, which is set last. If that memory is too small (no dq, or fewer than heads / 8 entries per
// token), every block of keys computes them itself and has 16 channels instead of 64. Heads of more than 64
// channels compute `move` once for every 64 channels, which is half as much work again at 128.
#pragma once

#include "attention_cuda.h"

namespace scalpel::cuda {
namespace {

constexpr int kStep = 16;                          // channels staged at once to compute `move`
constexpr int kFactorStride = kStep + 4;           // puts vectors of different rows in different banks
constexpr int kLaneStride = (kStep + 1) * kLanes;  // likewise for the lanes of different rows

// Only blocks of keys with this few channels can compute the statistics themselves. In larger blocks that
// code would take registers from the sums.
constexpr int kMakesStatistics = 16;

// The terms that a block sums over its columns. A term whose pointer is nullptr is left out.
template <class Real>
struct Sweep {
  AttentionPrimal<Real> at;
  LaneRows<const Real> row_lanes, column_lanes;  // factors of `move`, together with
  const Real *column_factor, *row_factor;        // the rows on the other side
  bool along;                                    // subtract u y from `move`, where u are the queries' lanes
  const Real* column_values;                     // multiplied by `move`
  LaneRows<const Real> column_added;             // multiplied by P
  bool drift;                                    // subtract y sum_c move at the end
  const Real* statistics;                        // (batch, heads, length, 2), or nullptr to compute them here
  LaneRows<Real> out;
};

template <class Real>
constexpr int kRows = sizeof(Real) == 4 ? 16 : 8;

template <class Real, int kOut>
struct Shared {
  static constexpr int kRow = kRows<Real>;
  static constexpr int kFactors = (kRow + 2 * kColumns) * kFactorStride;
  static constexpr int kMoveStage = kFactors + (kRow + kColumns) * kLaneStride;
  static constexpr int kFit = kMoveStage / (kOut * (kLanes + 1));
  static constexpr int kSub = kFit >= 16 ? 16 : kFit >= 8 ? 8 : 4;  // columns staged at once
  static_assert(kFit >= 4 && 2 * 16 * kScoreStride <= kMoveStage);

  alignas(16) Real stage[kMoveStage];
  alignas(16) Real weights[kColumns * kRow];  // P, where the rows of a column are contiguous
  Real move[kRow * kColumns * kLanes];
  Real along[kColumns * kLanes];  // u y of each query, or the sum of each row of `move`
  Real largest[kColumns], share[kColumns];
  // What the block works on. It is kept in shared memory because registers are scarce.
  Tile rows;
  int row, channel;  // the first row and channel
  int batch, kv_head, last_head;
};

// Computes `move` for one tile of columns, for the rows and columns of this thread.
template <class Real, int kOut, bool kByQuery>
__device__ __forceinline__ void make_move(const Sweep<Real>& sweep, const Tile& rows, const Tile& columns,
                                          Shared<Real, kOut>& shared, bool need_along) {
  constexpr int kRow = kRows<Real>;
  constexpr int kOwnRows = kRow / 4, kOwnColumns = kColumns / 4;
  constexpr int kQueries = kByQuery ? kRow : kColumns;
  const int thread = static_cast<int>(threadIdx.x);
  const int t = thread % kLanes, group = thread / kLanes;
  const int first_row = group / 4 * kOwnRows, first_column = group % 4;  // every fourth column is its own
  Real* const row_factor = shared.stage;
  Real* const column_factor = row_factor + kRow * kFactorStride;
  Real* const y = column_factor + kColumns * kFactorStride;
  Real* const row_lanes = y + kColumns * kFactorStride;
  Real* const column_lanes = row_lanes + kRow * kLaneStride;
  const Real* const u = (kByQuery ? row_lanes : column_lanes) + group * kLaneStride + t;
  const bool has_row_lanes = kByQuery && sweep.row_lanes.lanes != nullptr;
  const bool has_column_lanes = sweep.column_lanes.lanes != nullptr;
  const int d = sweep.at.d;
  Real sum[kOwnRows][kOwnColumns] = {};
  Real along = 0;
  for (int first = 0; first < d; first += kStep) {
    __syncthreads();
    if (has_row_lanes) {
      load_lanes<kRow, kStep, kLaneStride>(row_lanes, sweep.row_lanes, rows, first, d);
      load_rows<kColumns, kStep, kFactorStride>(column_factor, sweep.column_factor, columns, first, d);
    }
    if (has_column_lanes) {
      load_lanes<kColumns, kStep, kLaneStride>(column_lanes, sweep.column_lanes, columns, first, d);
      load_rows<kRow, kStep, kFactorStride>(row_factor, sweep.row_factor, rows, first, d);
    }
    if (need_along) {
      load_rows<kQueries, kStep, kFactorStride>(y, sweep.at.y, kByQuery ? rows : columns, first, d);
    }
    await_copies();
    constexpr int kPack = 2;
    using Few = Pack<Real, kPack>;
    const auto few = [](const Real* from) { return *reinterpret_cast<const Few*>(from); };
    if (has_row_lanes) {
#pragma unroll 1
      for (int c = 0; c < kStep; c += kPack) {
        Few factor[kOwnColumns];
#pragma unroll
        for (int j = 0; j < kOwnColumns; ++j) {
          factor[j] = few(column_factor + (first_column + 4 * j) * kFactorStride + c);
        }
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
          for (int e = 0; e < kPack; ++e) {
            const Real lane = row_lanes[(first_row + i) * kLaneStride + (c + e) * kLanes + t];
#pragma unroll
            for (int j = 0; j < kOwnColumns; ++j) sum[i][j] += lane * factor[j].x[e];
          }
        }
      }
    }
    if (has_column_lanes) {
#pragma unroll 1
      for (int c = 0; c < kStep; c += kPack) {
        Few factor[kOwnRows];
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) factor[i] = few(row_factor + (first_row + i) * kFactorStride + c);
#pragma unroll
        for (int j = 0; j < kOwnColumns; ++j) {
#pragma unroll
          for (int e = 0; e < kPack; ++e) {
            const Real lane = column_lanes[(first_column + 4 * j) * kLaneStride + (c + e) * kLanes + t];
#pragma unroll
            for (int i = 0; i < kOwnRows; ++i) sum[i][j] += lane * factor[i].x[e];
          }
        }
      }
    }
    if (need_along && group < kQueries) {
#pragma unroll
      for (int c = 0; c < kStep; c += 4) {
        const auto of_y = *reinterpret_cast<const Pack<Real, 4>*>(y + group * kFactorStride + c);
#pragma unroll
        for (int e = 0; e < 4; ++e) along += of_y.x[e] * u[(c + e) * kLanes];
      }
    }
  }
  if (need_along) {
    if (group < kQueries) shared.along[group * kLanes + t] = along;
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
    for (int j = 0; j < kOwnColumns; ++j) {
      const int r = first_row + i, c = first_column + 4 * j;
      Real value = sum[i][j];
      if (sweep.along) value -= shared.along[(kByQuery ? r : c) * kLanes + t];
      shared.move[(r * kColumns + c) * kLanes + t] = value * shared.weights[c * kRow + r] * sweep.at.scale;
    }
  }
}

// The rows and channels that this thread sums: consecutive rows, and every eighth channel.
template <class Real, int kOut>
struct Own {
  static constexpr int kOwnRows = kRows<Real> / 2, kOwnChannels = kOut / 8;
  static __device__ int first_row() { return static_cast<int>(threadIdx.x) / (8 * kLanes) * kOwnRows; }
  static __device__ int first_channel() { return static_cast<int>(threadIdx.x) / kLanes % 8; }
};

template <class Real, int kOut>
__device__ __forceinline__ void add_columns(
    const Sweep<Real>& sweep, const Tile& columns, int first, Shared<Real, kOut>& shared,
    Real (&sum)[Own<Real, kOut>::kOwnRows][Own<Real, kOut>::kOwnChannels]) {
  using O = Own<Real, kOut>;
  using S = Shared<Real, kOut>;
  constexpr int kRow = kRows<Real>;
  const int t = static_cast<int>(threadIdx.x) % kLanes;
  Real* const values = shared.stage;
  Real* const lanes = shared.stage + S::kSub * kOut;
  const bool has_values = sweep.column_values != nullptr, has_added = sweep.column_added.lanes != nullptr;
  for (int begin = 0; begin < columns.rows; begin += S::kSub) {
    Tile part = columns;
    part.token += begin;
    part.rows = columns.rows - begin < S::kSub ? columns.rows - begin : S::kSub;
    __syncthreads();
    if (has_values) load_rows<S::kSub, kOut, kOut>(values, sweep.column_values, part, first, sweep.at.d);
    if (has_added) {
      load_lanes<S::kSub, kOut, kOut * kLanes>(lanes, sweep.column_added, part, first, sweep.at.d);
    }
    await_copies();
    if (has_values) {
#pragma unroll 1
      for (int s = 0; s < part.rows; ++s) {
        Real move[O::kOwnRows];
#pragma unroll
        for (int i = 0; i < O::kOwnRows; ++i) {
          move[i] = shared.move[((O::first_row() + i) * kColumns + begin + s) * kLanes + t];
        }
#pragma unroll
        for (int c = 0; c < O::kOwnChannels; ++c) {
          const Real value = values[s * kOut + O::first_channel() + 8 * c];
#pragma unroll
          for (int i = 0; i < O::kOwnRows; ++i) sum[i][c] += value * move[i];
        }
      }
    }
    if (has_added) {
#pragma unroll 1
      for (int s = 0; s < part.rows; ++s) {
        const auto weight = *reinterpret_cast<const Pack<Real, O::kOwnRows>*>(
            shared.weights + (begin + s) * kRow + O::first_row());
#pragma unroll
        for (int c = 0; c < O::kOwnChannels; ++c) {
          const Real lane = lanes[(s * kOut + O::first_channel() + 8 * c) * kLanes + t];
#pragma unroll
          for (int i = 0; i < O::kOwnRows; ++i) sum[i][c] += weight.x[i] * lane;
        }
      }
    }
  }
}

// Writes the sums to the channels that `out` lists, or to all channels.
template <class Real, int kOut>
__device__ __forceinline__ void write_sums(
    const Sweep<Real>& sweep, const Tile& rows, int first, Shared<Real, kOut>& shared,
    Real (&sum)[Own<Real, kOut>::kOwnRows][Own<Real, kOut>::kOwnChannels]) {
  using O = Own<Real, kOut>;
  const int thread = static_cast<int>(threadIdx.x);
  const int t = thread % kLanes;
  const int d = sweep.at.d;
  const LaneRows<Real>& out = sweep.out;
  // The entry of each row and channel, or -1 if out does not list it.
  int* const entry = reinterpret_cast<int*>(shared.stage);
  if (out.index != nullptr) {
    const int count = d - first < kOut ? d - first : kOut;
    __syncthreads();
    for (int r = thread / 32; r < rows.rows; r += kWarps) {
      for (int c = thread % 32; c < kOut; c += 32) entry[r * kOut + c] = -1;
      __syncwarp();
      each_entry(out.index + (rows.token + r) * out.entries, static_cast<int>(out.entries),
                 rows.channel + first, count, [&](int c, int e) { entry[r * kOut + c] = e; });
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < O::kOwnRows; ++i) {
    const int r = O::first_row() + i;
#pragma unroll
    for (int j = 0; j < O::kOwnChannels; ++j) {
      const int c = O::first_channel() + 8 * j;
      if (r >= rows.rows || first + c >= d) continue;
      int e = rows.channel + first + c;
      if (out.index != nullptr) e = entry[r * kOut + c];
      if (e < 0) continue;
      Real value = sum[i][j];
      if (sweep.drift) {
        value -= sweep.at.y[(rows.token + r) * rows.width + rows.channel + first + c] *
                 shared.along[r * kLanes + t];
      }
      out.lanes[((rows.token + r) * out.entries + e) * kLanes + t] = value;
    }
  }
}

template <class Real, int kOut, bool kByQuery>
__global__ void __launch_bounds__(kThreads, 2) sweep_columns(Sweep<Real> sweep) {
  using S = Shared<Real, kOut>;
  using O = Own<Real, kOut>;
  constexpr int kRow = kRows<Real>;
  SCALPEL_DYNAMIC_SHARED(memory);
  S& shared = *reinterpret_cast<S*>(memory);
  const AttentionPrimal<Real>& at = sweep.at;
  const int thread = static_cast<int>(threadIdx.x);

  // Neighbouring blocks read the same head, which keeps it in cache; the blocks with the most work start
  // first.
  const unsigned tiles = static_cast<unsigned>((at.length + kRow - 1) / kRow);
  const unsigned chunks = static_cast<unsigned>((at.d + kOut - 1) / kOut);
  const unsigned heads = static_cast<unsigned>(kByQuery ? at.heads : at.kv_heads);
  const unsigned piece = blockIdx.x / chunks;
  const int mine = static_cast<int>(piece / tiles % heads), group = at.heads / at.kv_heads;
  if (thread == 0) {
    const unsigned of_tile = piece % tiles;
    shared.row = static_cast<int>(kByQuery ? tiles - 1 - of_tile : of_tile) * kRow;
    shared.channel = static_cast<int>(blockIdx.x % chunks) * kOut;
    shared.batch = static_cast<int>(piece / tiles / heads);
    shared.kv_head = kByQuery ? mine / group : mine;
    shared.last_head = kByQuery ? mine : mine * group + group - 1;
    const Place place{shared.batch, mine, shared.kv_head};
    shared.rows = kByQuery ? queries_at<kRow>(at, place, shared.row) : keys_at<kRow>(at, place, shared.row);
  }
  __syncthreads();

  Real sum[O::kOwnRows][O::kOwnChannels] = {};
  if (sweep.drift) shared.along[thread] = 0;
  bool need_along = sweep.along;  // when the queries are rows, it is computed only once
  for (int head = kByQuery ? mine : mine * group; head <= shared.last_head; ++head) {
    if (kByQuery) {
      softmax_statistics<kRow>(at, {shared.batch, head, shared.kv_head}, shared.row, shared.stage,
                               shared.largest, shared.share);
    }
    for (int begin = 0; begin < at.length; begin += kColumns) {
      const Place place{shared.batch, head, shared.kv_head};
      // Each of these threads stands for a query and a key of the tile, as in score_of.
      const int key = thread % (kByQuery ? kColumns : kRow), query = thread / (kByQuery ? kColumns : kRow);
      const bool within = thread < kRow * kColumns;
      const bool may = within && may_read(at, place, (kByQuery ? shared.row : begin) + query,
                                          (kByQuery ? begin : shared.row) + key);
      if (!__syncthreads_or(may)) continue;
      const Tile columns =
          kByQuery ? keys_at<kColumns>(at, place, begin) : queries_at<kColumns>(at, place, begin);
      if (!kByQuery) {
        if (kOut == kMakesStatistics && sweep.statistics == nullptr) {
          softmax_statistics<kColumns>(at, place, begin, shared.stage, shared.largest, shared.share);
        } else if (thread < columns.rows) {
          const std::int64_t heads_before = static_cast<std::int64_t>(place.batch) * at.heads + place.head;
          const Real* const both = sweep.statistics + 2 * (heads_before * at.length + begin + thread);
          shared.largest[thread] = both[0];
          shared.share[thread] = both[1];
        }
      }
      const Real score = score_of<kByQuery ? kRow : kColumns, kByQuery ? kColumns : kRow>(
          at, kByQuery ? shared.rows : columns, kByQuery ? columns : shared.rows, shared.stage);
      if (within) {
        const Real weight = may ? exponential(score - shared.largest[query]) * shared.share[query] : Real(0);
        shared.weights[kByQuery ? key * kRow + query : query * kRow + key] = weight;
      }
      if (sweep.column_values != nullptr) {
        make_move<Real, kOut, kByQuery>(sweep, shared.rows, columns, shared,
                                        kByQuery ? need_along : sweep.along);
        need_along = false;
      }
      add_columns<Real, kOut>(sweep, columns, shared.channel, shared, sum);
      if (kByQuery && sweep.drift && thread / kLanes < kRow) {
        const Real* const move = shared.move + thread / kLanes * kColumns * kLanes + thread % kLanes;
        Real drift = 0;
        for (int c = 0; c < columns.rows; ++c) drift += move[c * kLanes];
        shared.along[thread] += drift;
      }
    }
  }
  __syncthreads();
  write_sums<Real, kOut>(sweep, shared.rows, shared.channel, shared, sum);
}

}  // namespace
}  // namespace scalpel::cuda
