// How the threads that share a row hold it and search for its k-th largest key; topk_cuda.cu describes the
// whole.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../cuda/rows.h"

namespace scalpel::cuda::topk {

using device::Rows;

enum class Result { kMask, kKept, kIndex };
// kEither is decided at run time, which saves compiling a kernel twice.
enum class Order { kMagnitude, kValue, kEither };

// The rank of an entry as an unsigned number of its own width; larger ranks are kept first. All NaNs share
// the largest rank, and -0 and +0 share one. `infinity` is the bit pattern of +inf, which distinguishes
// float16 from bfloat16: larger magnitudes are NaNs.
template <class Bits_, Order kOrder>
struct Keys {
  using Bits = Bits_;
  // 16-bit entries are ranked in 32 bits, which avoids conversions.
  using Key = std::conditional_t<sizeof(Bits) == 8, std::uint64_t, std::uint32_t>;
  static constexpr Key kSign = Key{1} << (8 * sizeof(Bits) - 1);
  Key infinity;
  bool by_value;

  __device__ bool value() const { return kOrder == Order::kValue || (kOrder == Order::kEither && by_value); }
  __device__ Key of(Bits bits) const {
    const Key size = bits & (kSign - 1);
    const Key magnitude = size > infinity ? infinity + 1 : size;
    if (!value()) return magnitude;
    return (bits & kSign) != 0 && size <= infinity ? kSign - magnitude : kSign + magnitude;
  }
  // True when the rank of an entry is at least `from`, which is a rank or beyond(). Magnitudes need no check
  // for NaN, because `from` is never above the first NaN.
  __device__ bool reaches(Bits bits, Key from) const {
    return value() ? of(bits) >= from : static_cast<Key>(bits & (kSign - 1)) >= from;
  }
  // 1 if an entry reaches `from`, which is a rank, else 0. For magnitudes it is the sign bit of a
  // difference: two instructions including the addition to the count, where a comparison takes three.
  __device__ unsigned reached(Bits bits, Key from) const {
    if (value()) return of(bits) >= from ? 1u : 0u;
    return static_cast<unsigned>((from - 1 - static_cast<Key>(bits & (kSign - 1))) >> (8 * sizeof(Key) - 1));
  }
  // A value that no entry reaches.
  __device__ Key beyond() const { return value() ? most() + 1 : kSign; }
  // The next rank, or beyond().
  __device__ Key after(Key key) const { return key == most() ? beyond() : key + 1; }
  // The largest rank.
  __device__ Key most() const { return value() ? kSign + infinity + 1 : infinity + 1; }
  // Ordered like ranks, except that NaNs still differ; settled() makes them equal.
  __device__ Key rough(Bits bits) const { return value() ? of(bits) : static_cast<Key>(bits & (kSign - 1)); }
  __device__ Key settled(Key rough) const { return rough > most() ? most() : rough; }
  // The bits of an entry that ranks no higher than any other. They fill the places beyond the end of a row.
  __device__ Bits least() const { return value() ? static_cast<Bits>(kSign | infinity) : Bits{0}; }
};

struct Job {
  const void* x;
  void* out;
  Rows x_rows, out_rows;
  std::int64_t rows;
  int width;
  int k;
  std::uint64_t infinity;
  bool by_value;
};

constexpr unsigned kAll = 0xFFFFFFFFu;

// A group of threads that share a row: one warp.
struct WarpGroup {
  static constexpr int kPerBlock = 4;
  static constexpr bool kWide = false;  // its registers hold every row that it is given
  static constexpr std::size_t kWords = 0;
  __device__ explicit WarpGroup(unsigned*) {}
  static __device__ int size() { return 32; }
  static __device__ int rank() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ std::int64_t first_row() {
    return static_cast<std::int64_t>(blockIdx.x) * kPerBlock + threadIdx.x / 32;
  }
  static __device__ std::int64_t row_step() { return static_cast<std::int64_t>(gridDim.x) * kPerBlock; }

  __device__ unsigned sum(unsigned n) { return __reduce_add_sync(kAll, n); }
  template <class Key>
  __device__ Key largest(Key key) {
    for (int step = 16; step > 0; step /= 2) {
      const Key other = __shfl_xor_sync(kAll, key, step);
      key = other > key ? other : key;
    }
    return key;
  }
  // The sum over the threads before this one; `total` becomes the sum over all threads.
  __device__ unsigned before(unsigned n, unsigned& total) {
    unsigned sum = n;
    for (int step = 1; step < 32; step *= 2) {
      const unsigned other = __shfl_up_sync(kAll, sum, step);
      if (rank() >= step) sum += other;
    }
    total = __shfl_sync(kAll, sum, 31);
    return sum - n;
  }
  __device__ void end_row() {}
};

// A group of threads that share a row: a whole block. `words` is shared memory for three rounds, which makes
// one barrier per round sufficient: the words that a round overwrites were last read before the barrier of
// the previous round.
struct BlockGroup {
  static constexpr bool kWide = true;
  static constexpr std::size_t kWords = 3 * 33;
  unsigned* words;
  int round = 0;

  __device__ explicit BlockGroup(unsigned* shared) : words(shared) {}
  static __device__ int size() { return static_cast<int>(blockDim.x); }
  static __device__ int rank() { return static_cast<int>(threadIdx.x); }
  static __device__ std::int64_t first_row() { return blockIdx.x; }
  static __device__ std::int64_t row_step() { return gridDim.x; }

  __device__ unsigned* next() {
    unsigned* at = words + 33 * (round % 3);
    ++round;
    return at;
  }
  __device__ unsigned sum(unsigned n) {
    n = __reduce_add_sync(kAll, n);
    unsigned* at = next();
    if (rank() % 32 == 0) at[rank() / 32] = n;
    __syncthreads();
    const int lane = rank() % 32;
    return __reduce_add_sync(kAll, lane < size() / 32 ? at[lane] : 0u);
  }
  template <class Key>
  __device__ Key largest(Key key) {
    WarpGroup warp(nullptr);
    key = warp.largest(key);
    if constexpr (sizeof(Key) == 8) {
      const auto high = static_cast<unsigned>(key >> 32);
      const unsigned most = largest(high);
      const unsigned low = largest(high == most ? static_cast<unsigned>(key) : 0u);
      return static_cast<Key>(most) << 32 | low;
    } else {
      unsigned* at = next();
      if (rank() % 32 == 0) at[rank() / 32] = key;
      __syncthreads();
      const int warps = size() / 32;
      const int lane = rank() % 32;
      return warp.largest(lane < warps ? at[lane] : 0u);
    }
  }
  __device__ unsigned before(unsigned n, unsigned& total) {
    WarpGroup warp(nullptr);
    unsigned of_warp;
    const unsigned within = warp.before(n, of_warp);
    unsigned* at = next();
    if (rank() % 32 == 0) at[rank() / 32] = of_warp;
    __syncthreads();
    const int warps = size() / 32;
    const int lane = rank() % 32;
    const unsigned mine = lane < warps ? at[lane] : 0u;
    const unsigned earlier = warp.before(mine, total);
    return within + __shfl_sync(kAll, earlier, rank() / 32);
  }
  __device__ void end_row() { __syncthreads(); }
};

template <class Bits, int kVector>
struct alignas(sizeof(Bits) * kVector) Vector {
  Bits entry[kVector];
};

// What is kept: the keys above the threshold and the first `equal` of those that equal it. kAllEqual keeps
// all of the latter.
template <class Key>
struct Cut {
  Key threshold;
  unsigned equal;
};
constexpr unsigned kAllEqual = 0xFFFFFFFFu;

// The approximate square root of a count.
__device__ inline float root(unsigned n) {
  const auto x = static_cast<float>(n);
  return x * rsqrtf(n == 0 ? 1.0f : x);
}
__device__ inline int bit_width(std::uint32_t x) { return 32 - __clz(static_cast<int>(x)); }
__device__ inline int bit_width(std::uint64_t x) { return 64 - __clzll(static_cast<long long>(x)); }

// A row as its group holds it. Vector v of thread t is at element (v * size + t) * kVector. The first kHeld
// vectors of a thread are in registers, `shared_vectors` more in shared memory, and the rest stays in device
// memory. If a vector has more than one entry, the width is a multiple of that number.
template <class Bits, Order kOrder, class Group, int kHeld, int kVector>
struct Row {
  using Key = typename Keys<Bits, kOrder>::Key;
  using Vec = Vector<Bits, kVector>;
  static constexpr bool kPairs = sizeof(Bits) == 2 && kVector > 1;

  Group& group;
  Keys<Bits, kOrder> keys;
  const Bits* x;
  Vec* shared;
  int shared_vectors, vectors, width;
  Vec held[kHeld];

  __device__ int place(int v) const { return (v * group.size() + group.rank()) * kVector; }

  __device__ Vec read(int v) const {
    Vec found;
    const int at = place(v);
    if (at < width) {
      found = *reinterpret_cast<const Vec*>(x + at);
    } else {
      for (int e = 0; e < kVector; ++e) found.entry[e] = keys.least();
    }
    return found;
  }
  __device__ bool wide() const { return Group::kWide && vectors > kHeld + shared_vectors; }
  __device__ void load() {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) held[v] = read(v);
    if constexpr (Group::kWide) {
      for (int v = 0; v < shared_vectors; ++v) shared[v * group.size() + group.rank()] = read(kHeld + v);
    }
  }
  // Calls f(place, vector) for every vector of this thread, in ascending order.
  template <class F>
  __device__ void each(F f) const {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) f(place(v), held[v]);
    if constexpr (Group::kWide) {
      for (int v = kHeld; v < kHeld + shared_vectors; ++v)
        f(place(v), shared[(v - kHeld) * group.size() + group.rank()]);
      for (int v = kHeld + shared_vectors; v < vectors; ++v) f(place(v), read(v));
    }
  }
  // The number of keys that are at least `from`, which must be above the key that fills places beyond the
  // row.
  __device__ unsigned count(Key from) const {
    unsigned n = 0;
    if (kPairs && !keys.value()) {
      // Each word holds two magnitudes. With both sign bits set, subtracting `from` from each half never
      // borrows from the other half, and the sign bit remains set where the magnitude reaches `from`. The
      // halves cannot overflow: no thread holds 2^16 entries.
      const unsigned both = static_cast<unsigned>(from) * 0x10001u;
      each([&](int, const Vec& vec) {
        const auto* words = reinterpret_cast<const unsigned*>(&vec);
#pragma unroll
        for (int w = 0; w < kVector / 2; ++w) n += ((words[w] | 0x80008000u) - both) >> 15 & 0x00010001u;
      });
      n = (n & 0xFFFFu) + (n >> 16);
    } else {
      each([&](int, const Vec& vec) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) n += keys.reached(vec.entry[e], from);
      });
    }
    return group.sum(n);
  }

  // Narrows [low, high] to the smallest and largest key inside it; at least one key is inside. kAll states
  // that every key is.
  template <bool kAll>
  __device__ void tighten(Key& low, Key& high) {
    Key most = 0, rest = 0;  // rest: the largest complement, which belongs to the smallest key
    each([&](int at, const Vec& vec) {
      if (at >= width) return;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const Key key = kAll ? keys.rough(vec.entry[e]) : keys.of(vec.entry[e]);
        if (!kAll && (key < low || key > high)) continue;
        most = key > most ? key : most;
        rest = static_cast<Key>(~key) > rest ? static_cast<Key>(~key) : rest;
      }
    });
    high = keys.settled(group.largest(most));
    low = keys.settled(static_cast<Key>(~group.largest(rest)));
  }

  // For a row that is held whole. Narrows [low, high], which contains the smallest kept key, by counting the
  // keys that reach a guess. The guess interpolates linearly between the square roots of the counts: the
  // counts in a distribution's tail fall faster than a straight line, and in its middle they do not. If a
  // guess leaves more than half of the interval, the next step halves it. Every tenth step finds the
  // smallest and largest key that remain; when they are equal, which happens with ties, the search ends.
  __device__ Cut<Key> search(unsigned k) {
    constexpr int kTightenEvery = 10;
    Key low = 0, high = 0, before = 0;
    tighten<true>(low, high);
    unsigned from_low = static_cast<unsigned>(width), above = 0;
    float low_root = root(from_low), above_root = 0.0f;
    const float wanted = 0.5f * (root(k) + root(k - 1));
    bool guessed = false;
    for (int step = 1; low < high && from_low != k; ++step) {
      if (step % kTightenEvery == 0) {
        tighten<false>(low, high);
        if (low == high) break;
      }
      const Key size = high - low;
      guessed = !(guessed && size > before / 2);
      before = size;
      const float part = guessed ? __fdividef(low_root - wanted, low_root - above_root) : 0.5f;
      const Key guess = low + 1 + static_cast<Key>(part * static_cast<float>(size));
      const Key from = guess > high || guess <= low ? high : guess;
      const unsigned n = count(from);
      if (n >= k) {
        low = from;
        from_low = n;
        low_root = root(n);
      } else {
        high = from - 1;
        above = n;
        above_root = root(n);
      }
    }
    return {low, from_low == k ? kAllEqual : k - above};
  }

  // For a row that is not held whole. Every step reads the rest of the row again, so each distinguishes 1024
  // ranges of keys instead of two. It needs 1024 threads and kBins * kCopies words of shared memory. Every
  // count has kCopies copies, so that lanes that increment the same count rarely collide.
  static constexpr int kBins = 1024, kCopies = 8;
  __device__ Cut<Key> search_wide(unsigned k, unsigned* bins) {
    Key low = 0, high = keys.most();
    unsigned from_low = static_cast<unsigned>(width), above = 0;
    while (low < high && from_low != k) {
      const Key size = high - low;
      const int shift = max(0, bit_width(size) - 10);
      for (int i = group.rank(); i < kBins * kCopies; i += group.size()) bins[i] = 0;
      __syncthreads();
      each([&](int at, const Vec& vec) {
        if (at >= width) return;
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const Key apart = keys.of(vec.entry[e]) - low;  // a key below low wraps around to more than size
          if (apart <= size) atomicAdd(&bins[(apart >> shift) * kCopies + group.rank() % kCopies], 1u);
        }
      });
      __syncthreads();
      const int bin = kBins - 1 - group.rank();
      unsigned n = 0, all;
      for (int copy = 0; copy < kCopies; ++copy) n += bins[bin * kCopies + copy];
      const unsigned higher = above + group.before(n, all);
      unsigned* found = group.next();
      if (higher < k && k <= higher + n) {
        found[0] = static_cast<unsigned>(bin);
        found[1] = higher;
        found[2] = higher + n;
      }
      __syncthreads();
      low += static_cast<Key>(found[0]) << shift;
      const Key last = low + ((Key{1} << shift) - 1);
      high = last < high ? last : high;
      above = found[1];
      from_low = found[2];
    }
    return {low, from_low == k ? kAllEqual : k - above};
  }
};

}  // namespace scalpel::cuda::topk
