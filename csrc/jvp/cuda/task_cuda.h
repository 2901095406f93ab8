// What the kernels on lanes share. Neighbouring threads move the sixteen tangents of an entry, 16 bytes
// each, so that a warp reads and writes whole cache lines.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/device.h"
#include "jvp/task.h"

namespace scalpel::cuda::lanes {

constexpr unsigned kAll = 0xFFFFFFFFu;

template <class Real>
constexpr int kPack = 16 / static_cast<int>(sizeof(Real));  // tangents per thread
template <class Real>
constexpr int kParts = kTangentLanes / kPack<Real>;  // threads per entry

template <class Real>
struct alignas(16) Pack {
  Real at[kPack<Real>];
};

// Lanes that begin inside another array may not be aligned to a pack. The answer is the same for all
// threads.
inline bool aligned(const void* lanes) { return reinterpret_cast<std::uintptr_t>(lanes) % 16 == 0; }

template <class Real>
__device__ __forceinline__ Pack<Real> load(const Real* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const Pack<Real>*>(from);
  Pack<Real> pack;
#pragma unroll
  for (int i = 0; i < kPack<Real>; ++i) pack.at[i] = from[i];
  return pack;
}

template <class Real>
__device__ __forceinline__ void store(Real* to, const Pack<Real>& pack, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Pack<Real>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack<Real>; ++i) to[i] = pack.at[i];
}

template <class Real>
__device__ __forceinline__ void add(Pack<Real>& to, Real factor, const Pack<Real>& pack) {
#pragma unroll
  for (int i = 0; i < kPack<Real>; ++i) to.at[i] += factor * pack.at[i];
}

// Sums packs over the threads of a warp that hold the same part of an entry. Each step halves what a thread
// still carries, so that it ends with the sum of one tangent, whose number is written to `tangent`. Threads
// with the bit kParts set in their lane end with the same sums as their neighbours.
template <class Real>
__device__ __forceinline__ Real sum_over_warp(Pack<Real> pack, int lane, int& tangent) {
  int carried = kPack<Real>;
  tangent = lane % kParts<Real> * kPack<Real>;
#pragma unroll
  for (int step = 16; step >= kParts<Real>; step /= 2) {
    if (carried == 1) {
      pack.at[0] += __shfl_xor_sync(kAll, pack.at[0], step);
      continue;
    }
    carried /= 2;
    const bool upper = (lane & step) != 0;
    if (upper) tangent += carried;
#pragma unroll
    for (int i = 0; i < kPack<Real> / 2; ++i) {
      if (i >= carried) continue;
      const Real low = pack.at[i], high = pack.at[i + carried];
      pack.at[i] = (upper ? high : low) + __shfl_xor_sync(kAll, upper ? low : high, step);
    }
  }
  return pack.at[0];
}

inline std::int64_t pieces(std::int64_t n, std::int64_t piece) { return (n + piece - 1) / piece; }

// A grid with one block per unit of work.
inline dim3 grid_of(std::int64_t units) {
  if (units > 0x7FFFFFFF)
    jvp::refuse("the work needs " + std::to_string(units) +
                " blocks of a GPU; at most 2^31 - 1 are allowed: use a smaller batch");
  return dim3(static_cast<unsigned>(units));
}

}  // namespace scalpel::cuda::lanes
