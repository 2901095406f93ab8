// The building blocks of attention's kernels: tiles of rows and of lanes in shared memory, scores, and the
// statistics of the softmax. attention_sweep.h combines them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/device.h"
#include "jvp/jvp.h"
#include "jvp/kernel.h"

namespace scalpel::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLanes = kTangentLanes;
constexpr int kColumns = 16;                      // keys or queries in a tile that is summed over
constexpr int kScoreChannels = 64;                // channels of q and k staged at once for the scores
constexpr int kScoreStride = kScoreChannels + 4;  // puts vectors of different rows in different banks
constexpr int kScoreRows = 16;                    // queries of a block that only computes statistics
constexpr unsigned kAll = 0xFFFFFFFFu;

// What the kernels read of the primal; the fields are those of Attention in jvp.h.
template <class Real>
struct AttentionPrimal {
  const Real *q, *k, *v, *y;
  const std::uint8_t* allowed;
  const Real* sink;        // or nullptr
  std::int64_t mask_step;  // the stride between the masks of batch rows: 0 if they share one
  Real scale;
  int length, d, heads, kv_heads;
};

// One head of some consecutive tokens.
struct Tile {
  std::int64_t token;  // the first token, counted over the whole batch
  int channel;         // the head's first
  int width;           // all channels of a token
  int rows;            // the number of tokens that exist
};

struct Place {
  int batch, head, kv_head;
};

template <int kRows, class Real>
__device__ Tile queries_at(const AttentionPrimal<Real>& at, const Place& place, int first) {
  const int left = at.length - first;
  return {static_cast<std::int64_t>(place.batch) * at.length + first, place.head * at.d, at.heads * at.d,
          left < kRows ? left : kRows};
}
template <int kRows, class Real>
__device__ Tile keys_at(const AttentionPrimal<Real>& at, const Place& place, int first) {
  const int left = at.length - first;
  return {static_cast<std::int64_t>(place.batch) * at.length + first, place.kv_head * at.d,
          at.kv_heads * at.d, left < kRows ? left : kRows};
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
template <class Real>
__device__ __forceinline__ Real never() {
  return static_cast<Real>(-HUGE_VALF);
}

template <class Real, int kCount>
struct alignas(sizeof(Real) * kCount < 16 ? sizeof(Real) * kCount : 16) Pack {
  Real x[kCount];
};

// Copies kBytes (4, 8 or 16, aligned to as many) from device memory to shared memory, or writes zeros if not
// `wanted`. The copy neither blocks nor occupies registers, so that many can be in flight; await_copies()
// waits for those of all threads of the block.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool wanted) {
#if defined(__CUDACC__)
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(wanted ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes),
                 "r"(wanted ? kBytes : 0)
                 : "memory");
  }
#else
  if (wanted) {
    std::memcpy(to, from, kBytes);
  } else {
    std::memset(to, 0, kBytes);
  }
#endif
}
__device__ __forceinline__ void await_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  __syncthreads();
}

// The loads below only start copies; call await_copies() before reading the result.

// Loads channels [first, first + kChannels) of a tile's head, with zeros where there are none.
template <int kRows, int kChannels, int kStride, class Real>
__device__ __forceinline__ void load_rows(Real* to, const Real* from, const Tile& tile, int first, int d) {
  const Real* const head = from + tile.token * tile.width + tile.channel + first;
#pragma unroll 1
  for (int x = static_cast<int>(threadIdx.x); x < kRows * kChannels; x += kThreads) {
    const int r = x / kChannels, c = x % kChannels;
    const bool there = r < tile.rows && first + c < d;
    const std::int64_t offset = there ? static_cast<std::int64_t>(r) * tile.width + c : 0;
    copy_async<sizeof(Real)>(to + r * kStride + c, head + offset, there);
  }
}

// The first entry of an ascending row whose channel is at least `channel`. The whole warp must call it. If
// the row does not ascend, the result is meaningless but still within the row.
__device__ inline int first_entry(const std::int64_t* row, int entries, int channel) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int low = 0, high = entries;  // the result is in [low, high]
  while (low < high) {
    const int step = (high - low - 1) / 32 + 1;
    const int probe = low + (lane + 1) * step - 1;
    const int before = __popc(__ballot_sync(kAll, probe < high && row[probe] < channel));
    low += before * step;
    high = high - low < step ? high : low + step - 1;
  }
  return low;
}

// Calls f(channel - first, entry) for the entries of one token whose channel is in [first, first + count).
// Half a warp handles an entry, so that its sixteen threads take the sixteen lanes. All threads of the warp
// must call it.
template <class F>
__device__ __forceinline__ void each_entry(const std::int64_t* row, int entries, int first, int count, F f) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int e = first_entry(row, entries, first); e < entries; e += 32) {
    int channel = -1;
    if (e + lane < entries) {
      const std::int64_t of_head = row[e + lane] - first;
      if (of_head >= 0 && of_head < count) channel = static_cast<int>(of_head);
    }
    const unsigned wanted = __ballot_sync(kAll, channel >= 0);
    if (wanted == 0) break;
    const int last = 32 - __clz(static_cast<int>(wanted));
#pragma unroll 1
    for (int i = 0; i < last; i += 2) {
      const int mine = i + lane / 16;
      const int c = __shfl_sync(kAll, channel, mine);
      if ((wanted >> mine & 1u) != 0) f(c, e + mine);
    }
  }
}

// Loads the lanes of channels [first, first + kChannels) of a tile's head, with zeros where there are none.
// Row r begins at r * kStride.
template <int kRows, int kChannels, int kStride, class Real>
__device__ __forceinline__ void load_lanes(Real* to, const LaneRows<const Real>& of, const Tile& tile,
                                           int first, int d) {
  const int count = d - first < kChannels ? d - first : kChannels;
  if (of.index == nullptr) {
    const Real* const from = of.lanes + (tile.token * of.entries + tile.channel + first) * kLanes;
    const auto load = [&](auto pack) {
      constexpr int kVector = sizeof(pack) / sizeof(Real);
      constexpr int kVectors = kChannels * kLanes / kVector;
#pragma unroll 1
      for (int x = static_cast<int>(threadIdx.x); x < kRows * kVectors; x += kThreads) {
        const int r = x / kVectors, place = x % kVectors * kVector;
        const bool there = r < tile.rows && place < count * kLanes;
        const std::int64_t offset = there ? r * of.entries * kLanes + place : 0;
        copy_async<sizeof(pack)>(to + r * kStride + place, from + offset, there);
      }
    };
    if (reinterpret_cast<std::uintptr_t>(from) % 16 == 0) {
      load(Pack<Real, 16 / sizeof(Real)>{});
    } else {
      load(Real{});
    }
    return;
  }
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int r = static_cast<int>(threadIdx.x / 32); r < kRows; r += kWarps) {
    Real* const row = to + r * kStride;
#pragma unroll 4
    for (int x = lane; x < kChannels * kLanes; x += 32) row[x] = 0;
    __syncwarp();
    if (r >= tile.rows) continue;
    const std::int64_t begin = (tile.token + r) * of.entries;
    each_entry(of.index + begin, static_cast<int>(of.entries), tile.channel + first, count,
               [&](int c, int e) {
                 copy_async<sizeof(Real)>(row + c * kLanes + lane % kLanes,
                                          of.lanes + (begin + e) * kLanes + lane % kLanes, true);
               });
  }
}

// True when query `i` of the batch row may read key `j`.
template <class Real>
__device__ __forceinline__ bool may_read(const AttentionPrimal<Real>& at, const Place& place, int i, int j) {
  if (i >= at.length || j >= at.length) return false;
  return at.allowed[place.batch * at.mask_step + static_cast<std::int64_t>(i) * at.length + j] != 0;
}

// Computes one score per thread, of a query and a key of two tiles; neighbouring threads have neighbouring
// keys. Needs at least kQueries * kKeys threads.
template <int kQueries, int kKeys, class Real>
__device__ Real score_of(const AttentionPrimal<Real>& at, const Tile& queries, const Tile& keys,
                         Real* stage) {
  static_assert(kQueries * kKeys <= kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  Real* const q = stage;
  Real* const k = stage + kQueries * kScoreStride;
  const Real* const mine = q + thread / kKeys % kQueries * kScoreStride;
  const Real* const theirs = k + thread % kKeys * kScoreStride;
  Real sum = 0;
  for (int first = 0; first < at.d; first += kScoreChannels) {
    __syncthreads();
    load_rows<kQueries, kScoreChannels, kScoreStride>(q, at.q, queries, first, at.d);
    load_rows<kKeys, kScoreChannels, kScoreStride>(k, at.k, keys, first, at.d);
    await_copies();
    const int count = at.d - first < kScoreChannels ? at.d - first : kScoreChannels;
#pragma unroll 1
    for (int c = 0; c < count; c += 4) {
      const auto a = *reinterpret_cast<const Pack<Real, 4>*>(mine + c);
      const auto b = *reinterpret_cast<const Pack<Real, 4>*>(theirs + c);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += a.x[i] * b.x[i];
    }
  }
  return sum * at.scale;
}

// Computes for every query of a tile the largest score, and one over the sum of e^(score - largest), both
// including the sink. Both are zero for a query that may read nothing. Synchronise the block before reading
// them.
template <int kQueries, class Real>
__device__ void softmax_statistics(const AttentionPrimal<Real>& at, const Place& place, int first,
                                   Real* stage, Real* largest, Real* share) {
  constexpr int kKeys = 16;
  const int query = static_cast<int>(threadIdx.x) / kKeys, key = static_cast<int>(threadIdx.x) % kKeys;
  const Tile queries = queries_at<kQueries>(at, place, first);
  Real best = never<Real>(), total = 0;
  if (key == 0 && at.sink != nullptr) {
    best = at.sink[place.head];
    total = 1;
  }
  for (int j = 0; j < at.length; j += kKeys) {
    const bool mine = query < kQueries && may_read(at, place, first + query, j + key);
    if (!__syncthreads_or(mine)) continue;
    const Real score = score_of<kQueries, kKeys>(at, queries, keys_at<kKeys>(at, place, j), stage);
    if (!mine || score == never<Real>()) continue;
    if (score > best) {
      total = total * exponential(best - score) + 1;
      best = score;
    } else {
      total += exponential(score - best);
    }
  }
#pragma unroll
  for (int step = kKeys / 2; step > 0; step /= 2) {
    const Real other = __shfl_xor_sync(kAll, best, step), of_other = __shfl_xor_sync(kAll, total, step);
    const Real top = other > best ? other : best;
    const Real ours = best == never<Real>() ? 0 : exponential(best - top);
    const Real theirs = other == never<Real>() ? 0 : exponential(other - top);
    total = total * ours + of_other * theirs;
    best = top;
  }
  if (key == 0 && query < kQueries) {
    largest[query] = best == never<Real>() ? 0 : best;
    share[query] = best == never<Real>() ? 0 : 1 / total;
  }
}

// Writes the statistics of all queries, (batch, heads, length, 2), with one block for every sixteen queries.
template <class Real>
__global__ void __launch_bounds__(kThreads) write_statistics(AttentionPrimal<Real> at, Real* to) {
  alignas(16) __shared__ Real stage[2 * kScoreRows * kScoreStride];
  __shared__ Real largest[kScoreRows], share[kScoreRows];
  const unsigned tiles = static_cast<unsigned>((at.length + kScoreRows - 1) / kScoreRows);
  const int first = static_cast<int>(tiles - 1 - blockIdx.x % tiles) * kScoreRows;
  const unsigned head = blockIdx.x / tiles;
  const unsigned heads = static_cast<unsigned>(at.heads), kv_heads = static_cast<unsigned>(at.kv_heads);
  Place place;
  place.batch = static_cast<int>(head / heads);
  place.head = static_cast<int>(head % heads);
  place.kv_head = static_cast<int>(head % heads / (heads / kv_heads));
  softmax_statistics<kScoreRows>(at, place, first, stage, largest, share);
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x);
  if (row >= kScoreRows || first + row >= at.length) return;
  Real* const both = to + 2 * (static_cast<std::int64_t>(head) * at.length + first + row);
  both[0] = largest[row];
  both[1] = share[row];
}

}  // namespace
}  // namespace scalpel::cuda
