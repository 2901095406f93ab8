// How a row is held by the threads that share it, and how its k-th largest key is searched; see topk_cuda.cu.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../cuda/rows.h"

namespace scalpel::cuda::topk {

using device::Rows;

enum class Result { kMask, kKept, kIndex };
enum class Order { kMagnitude, kValue, kEither };  // kEither: told at run time, which saves compiling twice

// An entry's rank as an unsigned number of its own width: larger is kept first. All NaNs have the largest, ±0
// the same. `infinity`: its bits, which tell float16 from bfloat16; NaNs are above.
template <class Bits_, Order kOrder>
struct Keys {
  using Bits = Bits_;
  // Counting in 32 bits what has 16 spares conversions.
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
  // Ranks no higher than any entry; what stands where a row has none.
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

// The threads that share a row: a warp.
struct WarpGroup {
  static constexpr int kPerBlock = 4;
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
  // The sum over the threads before this one, and over all.
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

// A whole block. `words`: shared, for three rounds, so that one barrier a round is enough: what a round
// clears was last read before the barrier of the round before.
struct BlockGroup {
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
    unsigned total;
    before(n, total);
    return total;
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

// A row as its group holds it: vector v of thread t stands at (v * size + t) * kVector. The first kHeld
// vectors of a thread are in registers, `shared` more in shared memory, the rest in memory.
template <class Bits, Order kOrder, class Group, int kHeld, int kVector>
struct Row {
  using Key = typename Keys<Bits, kOrder>::Key;
  using Vec = Vector<Bits, kVector>;

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
  __device__ void load() {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) held[v] = read(v);
    for (int v = 0; v < shared_vectors; ++v) shared[v * group.size() + group.rank()] = read(kHeld + v);
  }
  // f(vector's place, vector) for every vector of this thread, in ascending order.
  template <class F>
  __device__ void each(F f) const {
#pragma unroll
    for (int v = 0; v < kHeld; ++v) f(place(v), held[v]);
    for (int v = kHeld; v < kHeld + shared_vectors; ++v)
      f(place(v), shared[(v - kHeld) * group.size() + group.rank()]);
    for (int v = kHeld + shared_vectors; v < vectors; ++v) f(place(v), read(v));
  }
  // How many keys are at least `from`, which is above the key of what isn't there.
  __device__ unsigned count(Key from) {
    unsigned n = 0;
    each([&](int, const Vec& vec) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) n += keys.of(vec.entry[e]) >= from ? 1u : 0u;
    });
    return group.sum(n);
  }

  // The least key that is kept, and how many of those equal to it are.
  __device__ void search(unsigned k, Key& threshold, unsigned& equal) {
    Key most = 0, least = 0;  // least: the largest of the complements
    each([&](int at, const Vec& vec) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const Key key = keys.of(vec.entry[e]);
        most = key > most ? key : most;
        if (at + e<width&& static_cast<Key>(~key)> least) least = static_cast<Key>(~key);
      }
    });
    Key high = group.largest(most), low = static_cast<Key>(~group.largest(least));
    unsigned from_low = static_cast<unsigned>(width), above = 0;
    while (low < high && from_low != k) {
      const Key middle = low + (high - low) / 2 + 1;
      const unsigned n = count(middle);
      if (n >= k) {
        low = middle;
        from_low = n;
      } else {
        high = middle - 1;
        above = n;
      }
    }
    threshold = low;
    equal = from_low == k ? 0xFFFFFFFFu : k - above;  // all of them, or so many
  }
};

}  // namespace scalpel::cuda::topk
