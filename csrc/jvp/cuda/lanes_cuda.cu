// Sparse linear layers on a GPU: on lanes, and on plain rows with sixteen tokens as the lanes.
//
// A block keeps the lines of a token (entries of sixteen tangents) in shared memory, or as many as fit, and
// its warps run through the rows of the matrix. A warp reads 32 non-zeros at a time, looks up their lines,
// and queues those that have one; it then multiplies eight of them (float64: four) per step. A non-zero
// therefore costs 8 bytes (float64: 12) of cache bandwidth, and only one that meets an entry costs a line of
// shared memory. Shared memory bandwidth is the limit: at most two lines per SM and cycle (float64: one).
// The sums of eight rows are collected before they are written.
//
// Lines that do not fit are processed in tiles of ascending channels, and every row resumes where the
// previous tile ended.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "jvp_cuda.h"
#include "task_cuda.h"

namespace scalpel::cuda {
namespace {

using namespace lanes;

constexpr int kRun = 8;             // rows of the matrix that a warp takes at once
constexpr int kHits = 64;           // non-zeros that a warp can queue
constexpr int kMostThreads = 1024;  // threads per block
constexpr std::uint16_t kNone = 0xFFFF;

template <class Real>
struct Product {
  const std::int64_t* starts;
  const std::int32_t* columns;
  const Real* weights;
  const Real* in;  // lanes or rows
  const std::int64_t* in_index;
  const std::int64_t* out_index;
  std::int64_t tokens;
  const Real* factor;  // the scale for lanes, the bias for rows
  Real* out;
  int cols, entries, outputs;
  bool in_aligned;
};

// How the work is divided: a block handles one token (for rows: sixteen) and `share` of its outputs.
struct Plan {
  int parts, share;
  int tiles;
  int lines;  // lines per tile
  bool mapped;
};

template <class Real>
struct alignas(2 * sizeof(Real)) Hit {
  Real weight;
  std::int32_t line;  // the offset of the line
};

// One non-zero per lane of the warp; column is -1 past the end.
template <class Real>
struct Batch {
  std::int32_t column;
  Real weight;
};

template <class Real>
__device__ __forceinline__ Batch<Real> fetch(const Product<Real>& job, std::int64_t at, int left, int lane) {
  if (lane >= left) return {-1, Real(0)};
  return {job.columns[at + lane], job.weights[at + lane]};
}

// The number of values below `limit` among n ascending numbers.
template <class Int>
__device__ int count_below(const Int* numbers, int n, std::int64_t limit) {
  int begin = 0;
  while (begin < n) {
    const int middle = begin + (n - begin) / 2;
    if (numbers[middle] < limit) {
      begin = middle + 1;
    } else {
      n = middle;
    }
  }
  return begin;
}

// The entries [from, from + count) of a token, and the line of each channel.
template <class Real>
struct Tile {
  int from, end;                 // end: the first channel past this tile
  const std::int64_t* channels;  // the channels of these entries, or nullptr
  const std::uint16_t* map;      // from channels to lines, or nullptr
  int count;

  // The line of a channel, or -1 if it has no entry. A channel that is listed twice has its last entry.
  __device__ __forceinline__ int line_of(std::int32_t channel) const {
    if (channels == nullptr) return channel - from;
    if (map != nullptr) return map[channel] == kNone ? -1 : map[channel];
    const int found = count_below(channels, count, std::int64_t{channel} + 1) - 1;
    return found >= 0 && channels[found] == channel ? found : -1;
  }
};

template <class Real>
__device__ Tile<Real> bring_lanes(const Product<Real>& job, const Plan& plan, std::int64_t token, int tile,
                                  Real* lines, std::uint16_t* map) {
  const int from = tile * plan.lines;
  const bool last = tile + 1 == plan.tiles;
  const int count = last ? job.entries - from : plan.lines;
  const Real* in = job.in + (token * job.entries + from) * kTangentLanes;
  const int step = static_cast<int>(blockDim.x), rank = static_cast<int>(threadIdx.x);
  // Issues four loads before the first store, because the compiler cannot move a load over a store.
  for (int i = rank; i < count * kParts<Real>; i += 4 * step) {
    Pack<Real> held[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int j = i + u * step;
      if (j < count * kParts<Real>) held[u] = load(in + j * kPack<Real>, job.in_aligned);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int j = i + u * step;
      if (j < count * kParts<Real>) store(lines + j * kPack<Real>, held[u], true);
    }
  }
  if (job.in_index == nullptr) return {from, from + count, nullptr, nullptr, count};
  const std::int64_t* channels = job.in_index + token * job.entries + from;
  const int end = last ? job.cols : static_cast<int>(channels[count]);
  if (!plan.mapped) return {from, end, channels, nullptr, count};
  // Channels of earlier tiles are not looked up any more.
  for (int c = (tile == 0 ? 0 : static_cast<int>(channels[0])) + rank; c < end; c += step) map[c] = kNone;
  __syncthreads();
  for (int e = rank; e < count; e += step) {
    // Of entries with equal channels the last one counts; it may be in the next tile.
    const bool more = from + e + 1 < job.entries;
    if (!more || channels[e + 1] != channels[e]) map[channels[e]] = static_cast<std::uint16_t>(e);
  }
  return {from, end, channels, map, count};
}

// Transposes sixteen rows of x. A warp reads eight columns of four rows, which are whole sectors of memory,
// and at most four threads share a bank when it writes.
template <class Real>
__device__ Tile<Real> bring_rows(const Product<Real>& job, const Plan& plan, std::int64_t first, int tile,
                                 Real* lines) {
  const int from = tile * plan.lines;
  const int count = tile + 1 == plan.tiles ? job.entries - from : plan.lines;
  const int lane = static_cast<int>(threadIdx.x % 32), warps = static_cast<int>(blockDim.x / 32);
  const int steps = (count + 7) / 8 * 4;
  for (int i = static_cast<int>(threadIdx.x / 32); i < steps; i += 4 * warps) {
    Real held[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int j = i + u * warps, c = j / 4 * 8 + lane % 8, t = j % 4 * 4 + lane / 8;
      const bool there = j < steps && c < count && first + t < job.tokens;
      held[u] = there ? job.in[(first + t) * job.entries + from + c] : Real(0);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int j = i + u * warps, c = j / 4 * 8 + lane % 8, t = j % 4 * 4 + lane / 8;
      if (j < steps && c < count) lines[c * kTangentLanes + t] = held[u];
    }
  }
  return {from, from + count, nullptr, nullptr, count};
}

// Adds the hits [0, n). Each group of kParts threads takes one at a time.
template <class Real>
__device__ __forceinline__ void multiply_hits(const Hit<Real>* hits, int n, const Real* lines, int lane,
                                              Pack<Real>& sum) {
  constexpr int kGroups = 32 / kParts<Real>;
  const Real* part = lines + lane % kParts<Real> * kPack<Real>;
#pragma unroll 4
  for (int i = lane / kParts<Real>; i < n; i += kGroups) {
    const Hit<Real> hit = hits[i];
    add(sum, hit.weight, load(part + hit.line, true));
  }
}

// Computes the tile's part of the products of `count` rows, (kRun, 16). Lane r holds where the non-zeros of
// row r within the tile begin, and how many there are.
template <class Real>
__device__ void multiply_run(const Product<Real>& job, const Tile<Real>& tile, const Real* lines, int count,
                             std::int64_t at, int length, bool first, Hit<Real>* hits, Real* results) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned before = (1u << lane) - 1;
  std::int64_t p = __shfl_sync(kAll, at, 0);
  int left = __shfl_sync(kAll, length, 0);
  Batch<Real> now = fetch(job, p, left, lane);
  for (int r = 0; r < count; ++r) {
    Pack<Real> sum{};
    int waiting = 0;
    bool lost = false;  // a non-finite weight met a zero tangent, which must give NaN
    bool more;
    do {
      // The next non-zeros, from this row or the following one, are loaded while these are multiplied.
      more = left > 32;
      if (more) {
        p += 32;
        left -= 32;
      } else {
        p = __shfl_sync(kAll, at, r + 1);
        left = __shfl_sync(kAll, length, r + 1);
      }
      const Batch<Real> next = fetch(job, p, left, lane);
      const int line = now.column < 0 ? -1 : tile.line_of(now.column);
      lost |= line < 0 && !(now.weight * Real(0) == Real(0));
      const unsigned votes = __ballot_sync(kAll, line >= 0);
      if (line >= 0) hits[waiting + __popc(votes & before)] = {now.weight, line * kTangentLanes};
      waiting += __popc(votes);
      __syncwarp();
      if (waiting >= 32) {
        multiply_hits(hits, 32, lines, lane, sum);
        waiting -= 32;
        const Hit<Real> moved = hits[32 + lane];
        __syncwarp();
        if (lane < waiting) hits[lane] = moved;
        __syncwarp();
      }
      now = next;
    } while (more);
    multiply_hits(hits, waiting, lines, lane, sum);
    __syncwarp();
    int tangent;
    Real total = sum_over_warp(sum, lane, tangent);
    if (__any_sync(kAll, lost)) total += Real(NAN);
    if ((lane & kParts<Real>) == 0) {
      Real& result = results[r * kTangentLanes + tangent];
      result = first ? total : result + total;
    }
  }
}

template <class Real, bool kRows>
__global__ void __launch_bounds__(kMostThreads)
    multiply(const __grid_constant__ Product<Real> job, const __grid_constant__ Plan plan) {
  SCALPEL_DYNAMIC_SHARED(memory);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  auto* const lines = reinterpret_cast<Real*>(memory);
  auto* const all_hits = reinterpret_cast<Hit<Real>*>(lines + plan.lines * kTangentLanes);
  auto* const all_results = reinterpret_cast<Real*>(all_hits + warps * kHits);
  auto* const map = reinterpret_cast<std::uint16_t*>(all_results + warps * kRun * kTangentLanes);
  Hit<Real>* const hits = all_hits + warp * kHits;
  Real* const results = all_results + warp * kRun * kTangentLanes;

  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x / plan.parts) * (kRows ? kTangentLanes : 1);
  const int first = static_cast<int>(blockIdx.x % plan.parts) * plan.share;
  const int last = min(job.outputs, first + plan.share);
  Tile<Real> tile{};
  for (int pass = first; pass < last; pass += warps * kRun) {
    const int begin = pass + warp * kRun;
    const int count = min(kRun, max(0, last - begin));
    std::int64_t at = 0;
    int left = 0;
    if (lane < count) {
      const int output = begin + lane;
      const std::int64_t row =
          job.out_index == nullptr ? output : job.out_index[token * job.outputs + output];
      at = job.starts[row];
      left = static_cast<int>(job.starts[row + 1] - at);
    }
    for (int t = 0; t < plan.tiles; ++t) {
      if (plan.tiles > 1 || pass == first) {
        __syncthreads();  // no thread still reads the previous lines
        if constexpr (kRows) {
          tile = bring_rows(job, plan, token, t, lines);
        } else {
          tile = bring_lanes(job, plan, token, t, lines, map);
        }
        __syncthreads();
      }
      const int here = t + 1 < plan.tiles ? count_below(job.columns + at, left, tile.end) : left;
      multiply_run(job, tile, lines, count, at, here, t == 0, hits, results);
      at += here;
      left -= here;
    }
    __syncwarp();
    if constexpr (kRows) {
      for (int i = lane; i < kRun * kTangentLanes; i += 32) {
        const int r = i % kRun, t = i / kRun;
        if (r >= count || token + t >= job.tokens) continue;
        const Real added = job.factor == nullptr ? Real(0) : job.factor[begin + r];
        job.out[(token + t) * job.outputs + begin + r] = results[r * kTangentLanes + t] + added;
      }
    } else {
      const std::int64_t to = token * job.outputs + begin;
      for (int i = lane; i < count * kTangentLanes; i += 32) {
        const Real factor = job.factor == nullptr ? Real(1) : job.factor[to + i / kTangentLanes];
        job.out[to * kTangentLanes + i] = results[i] * factor;
      }
    }
    __syncwarp();  // the next run reuses the results
  }
}

template <class Real, bool kRows>
void start(const Product<Real>& job, const CudaQueue& queue) {
  const device::OnDevice on(queue);
  constexpr int kLine = kTangentLanes * static_cast<int>(sizeof(Real));
  constexpr int kOfWarp = kHits * static_cast<int>(sizeof(Hit<Real>)) + kRun * kLine;
  const auto most = static_cast<int>(device::most_shared());
  const std::int64_t groups = kRows ? pieces(job.tokens, kTangentLanes) : job.tokens;
  const std::int64_t wanted = 4 * device::multiprocessors();
  Plan plan;
  // The map takes at most a sixth of shared memory and leaves the rest to the lines.
  plan.mapped = job.in_index != nullptr && job.cols <= most / 6 / static_cast<int>(sizeof(std::uint16_t));
  const int map = plan.mapped ? job.cols * static_cast<int>(sizeof(std::uint16_t)) : 0;
  // If only one block fits a multiprocessor, it is a large one. With few outputs or little work, blocks are
  // small.
  int warps = job.entries > (most / 2 - 1024 - map - 16 * kOfWarp) / kLine ? 32 : 16;
  while (warps > 4 && (warps * kOfWarp > most / 2 || warps * kRun / 2 >= job.outputs ||
                       groups * pieces(job.outputs, warps * kRun) < wanted)) {
    warps /= 2;
  }
  plan.lines = std::max(1, std::min(job.entries, (most - warps * kOfWarp - map) / kLine));
  plan.tiles = std::max(1, static_cast<int>(pieces(job.entries, plan.lines)));
  // Outputs are divided among blocks only as far as necessary to occupy the device, because each block loads
  // the lines again.
  const std::int64_t passes = pieces(job.outputs, warps * kRun);
  const std::int64_t parts = std::min(pieces(wanted, groups), passes);
  plan.share = static_cast<int>(pieces(passes, parts)) * warps * kRun;
  plan.parts = static_cast<int>(pieces(job.outputs, plan.share));
  const int shared = plan.lines * kLine + warps * kOfWarp + map;
  device::launch(multiply<Real, kRows>, grid_of(groups * plan.parts), dim3(static_cast<unsigned>(warps * 32)),
                 static_cast<std::size_t>(shared), queue, job, plan);
}

int number_of(std::int64_t n, const char* of) {
  if (n < std::int64_t{1} << 30) return static_cast<int>(n);
  jvp::refuse("there are " + std::to_string(n) + " " + of + "; on a GPU fewer than 2^30 are allowed");
}

template <class Real>
Product<Real> product_of(const SparseMatrix& weight) {
  Product<Real> job{};
  job.cols = number_of(weight.cols, "columns");
  job.starts = jvp::data<const std::int64_t>(weight.starts);
  job.columns = jvp::data<const std::int32_t>(weight.columns);
  job.weights = jvp::data<const Real>(weight.weights);
  return job;
}

}  // namespace

void linear_lanes(const SparseMatrix& weight, const TensorView& in, const TensorView& in_index,
                  const TensorView& scale, const TensorView& out, const TensorView& out_index,
                  const CudaQueue& queue) {
  const DType dtype =
      jvp::check_linear_lanes(weight, in, in_index, scale, out, out_index, jvp::Contents::kTrusted);
  if (out.shape[0] == 0 || out.shape[1] == 0) return;
  jvp::for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    const auto from = jvp::rows_of<const Real>(in, in_index);
    const auto to = jvp::rows_of<Real>(out, out_index);
    Product<Real> job = product_of<Real>(weight);
    job.in = from.lanes;
    job.in_index = from.index;
    job.entries = number_of(from.entries, "entries");
    job.tokens = out.shape[0];
    job.factor = jvp::absent(scale) ? nullptr : jvp::data<const Real>(scale);
    job.out = to.lanes;
    job.out_index = to.index;
    job.outputs = number_of(to.entries, "outputs");
    job.in_aligned = aligned(job.in);
    start<Real, false>(job, queue);
  });
}

void linear_rows(const SparseMatrix& weight, const TensorView& x, const TensorView& bias,
                 const TensorView& out, const CudaQueue& queue) {
  const DType dtype = jvp::check_linear_rows(weight, x, bias, out, jvp::Contents::kTrusted);
  if (out.shape[0] == 0 || out.shape[1] == 0) return;
  jvp::for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    Product<Real> job = product_of<Real>(weight);
    job.in = jvp::data<const Real>(x);
    job.entries = job.cols;
    job.tokens = out.shape[0];
    job.factor = jvp::absent(bias) ? nullptr : jvp::data<const Real>(bias);
    job.out = jvp::data<Real>(out);
    job.outputs = number_of(out.shape[1], "outputs");
    start<Real, true>(job, queue);
  });
}

}  // namespace scalpel::cuda
