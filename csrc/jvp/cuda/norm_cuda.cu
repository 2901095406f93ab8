// Norms and copies on lanes on a GPU. Both are designed to be limited by memory bandwidth only.
//
// Norms use one block per token. It reads the token's lanes once for the means and once more for the result;
// the second time they mostly come from cache. When a norm or scatter adds entries to a channel, the threads
// of the channel's first entry also add the later entries that list the channel again. The order of the
// additions is therefore fixed, and no two threads write the same number.
#include <algorithm>
#include <cstdint>

#include "jvp_cuda.h"
#include "task_cuda.h"

namespace scalpel::cuda {
namespace {

using namespace lanes;

constexpr int kCopyThreads = 256;
constexpr int kTurned = 128;  // entries that a block transposes at once

// ---- norms -------------------------------------------------------------------------------------

template <class Real>
struct NormJob {
  const Real *normed, *rate, *gain;
  std::int64_t width, over;
  std::int64_t entries;  // of the array that has an index
  const std::int64_t* index;
  bool centred, in_aligned, out_aligned;
};

// Replaces `along` and `mean` by their sums over the block, times `share`. `words` is shared memory of shape
// (warps + 1, 2, 16).
template <class Real>
__device__ void mean_over_block(Pack<Real>& along, Pack<Real>& mean, Real share, Real* words) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warps = static_cast<int>(blockDim.x / 32);
  int tangent;
  const Real of_along = sum_over_warp(along, lane, tangent);
  const Real of_mean = sum_over_warp(mean, lane, tangent);
  if ((lane & kParts<Real>) == 0) {
    Real* mine = words + thread / 32 * 2 * kTangentLanes;
    mine[tangent] = of_along;
    mine[kTangentLanes + tangent] = of_mean;
  }
  __syncthreads();
  Real* total = words + warps * 2 * kTangentLanes;
  if (thread < 2 * kTangentLanes) {
    Real sum = 0;
    for (int w = 0; w < warps; ++w) sum += words[w * 2 * kTangentLanes + thread];
    total[thread] = sum * share;
  }
  __syncthreads();
  const int part = lane % kParts<Real> * kPack<Real>;
  along = load(total + part, true);
  mean = load(total + kTangentLanes + part, true);
}

template <class Real>
__global__ void __launch_bounds__(1024)
    norm_forward(const __grid_constant__ NormJob<Real> job, const Real* __restrict__ all_in,
                 Real* __restrict__ all_out) {
  SCALPEL_DYNAMIC_SHARED(memory);
  const int part = static_cast<int>(threadIdx.x) % kParts<Real> * kPack<Real>;
  const int first = static_cast<int>(threadIdx.x) / kParts<Real>;
  const int groups = static_cast<int>(blockDim.x) / kParts<Real>;
  const std::int64_t n = blockIdx.x;
  const Real* in = all_in + n * job.width * kTangentLanes + part;
  const Real* normed = job.normed + n * job.width;
  Pack<Real> stretch{}, shift{};
#pragma unroll 4
  for (std::int64_t c = first; c < job.over; c += groups) {
    const Pack<Real> entry = load(in + c * kTangentLanes, job.in_aligned);
    add(stretch, normed[c], entry);
    add(shift, Real(1), entry);
  }
  mean_over_block(stretch, shift, Real(1) / static_cast<Real>(job.over), reinterpret_cast<Real*>(memory));
  if (!job.centred) shift = Pack<Real>{};
  const std::int64_t* channels = job.index == nullptr ? nullptr : job.index + n * job.entries;
  Real* out = all_out + n * job.entries * kTangentLanes + part;
  const Real rate = job.rate[n];
#pragma unroll 2
  for (std::int64_t e = first; e < job.entries; e += groups) {
    const std::int64_t c = channels == nullptr ? e : channels[e];
    Pack<Real> entry = load(in + c * kTangentLanes, job.in_aligned);
    const Real slope = job.gain[c] * rate, at = normed[c];
#pragma unroll
    for (int i = 0; i < kPack<Real>; ++i) {
      entry.at[i] = slope * (entry.at[i] - shift.at[i] - at * stretch.at[i]);
    }
    store(out + e * kTangentLanes, entry, job.out_aligned);
  }
}

template <class Real>
__global__ void __launch_bounds__(1024)
    norm_backward(const __grid_constant__ NormJob<Real> job, const Real* __restrict__ all_in,
                  Real* __restrict__ all_out) {
  SCALPEL_DYNAMIC_SHARED(memory);
  const int part = static_cast<int>(threadIdx.x) % kParts<Real> * kPack<Real>;
  const int first = static_cast<int>(threadIdx.x) / kParts<Real>;
  const int groups = static_cast<int>(blockDim.x) / kParts<Real>;
  const std::int64_t n = blockIdx.x;
  const Real* in = all_in + n * job.entries * kTangentLanes + part;
  const std::int64_t* channels = job.index == nullptr ? nullptr : job.index + n * job.entries;
  const Real* normed = job.normed + n * job.width;
  Real* out = all_out + n * job.width * kTangentLanes + part;
  const Real rate = job.rate[n];
  Pack<Real> stretch{}, shift{};
#pragma unroll 2
  for (std::int64_t e = first; e < job.entries; e += groups) {
    const std::int64_t c = channels == nullptr ? e : channels[e];
    const Pack<Real> entry = load(in + e * kTangentLanes, job.in_aligned);
    const Real slope = job.gain[c] * rate;
    add(stretch, normed[c] * slope, entry);
    add(shift, slope, entry);
    if (channels == nullptr || (e > 0 && channels[e - 1] == c)) continue;
    Pack<Real> sum = load(out + c * kTangentLanes, job.out_aligned);
    add(sum, slope, entry);
    for (std::int64_t f = e + 1; f < job.entries && channels[f] == c; ++f) {
      add(sum, slope, load(in + f * kTangentLanes, job.in_aligned));
    }
    store(out + c * kTangentLanes, sum, job.out_aligned);
  }
  // The barriers in mean_over_block also make the added values visible to the whole block.
  mean_over_block(stretch, shift, Real(1) / static_cast<Real>(job.over), reinterpret_cast<Real*>(memory));
  if (!job.centred) shift = Pack<Real>{};
  // Without an index the entries are added in this loop, so that `out` is read only once.
  const bool dense = channels == nullptr;
#pragma unroll 2
  for (std::int64_t c = first; c < (dense ? job.width : job.over); c += groups) {
    Pack<Real> sum = load(out + c * kTangentLanes, job.out_aligned);
    if (dense) add(sum, job.gain[c] * rate, load(in + c * kTangentLanes, job.in_aligned));
    if (c < job.over) {
      const Real at = normed[c];
#pragma unroll
      for (int i = 0; i < kPack<Real>; ++i) sum.at[i] -= shift.at[i] + at * stretch.at[i];
    }
    store(out + c * kTangentLanes, sum, job.out_aligned);
  }
}

template <class Real>
NormJob<Real> norm_job(const Norm& norm, const LaneRows<const Real>& in, const LaneRows<Real>& out,
                       const std::int64_t* index, std::int64_t entries) {
  NormJob<Real> job{};
  job.normed = jvp::data<const Real>(norm.normed);
  job.rate = jvp::data<const Real>(norm.rate);
  job.gain = jvp::data<const Real>(norm.gain);
  job.width = norm.gain.shape[0];
  job.over = norm.over;
  job.entries = entries;
  job.index = index;
  job.centred = norm.centred;
  job.in_aligned = aligned(in.lanes);
  job.out_aligned = aligned(out.lanes);
  return job;
}

// Uses as many threads as give each about eight loads. Few large blocks also keep the second pass in cache.
template <class Real>
void start_norm(void (*kernel)(NormJob<Real>, const Real*, Real*), const NormJob<Real>& job,
                std::int64_t tokens, const Real* in, Real* out, const CudaQueue& queue) {
  const device::OnDevice on(queue);
  unsigned threads = 128;
  while (threads < 1024 && job.width * kParts<Real> > 8 * std::int64_t{threads}) threads *= 2;
  const std::size_t words = (threads / 32 + 1) * 2 * kTangentLanes;
  device::launch(kernel, grid_of(tokens), dim3(threads), words * sizeof(Real), queue, job, in, out);
}

// ---- copies ------------------------------------------------------------------------------------

// A block handles kCopyThreads / kParts entries, and consecutive blocks belong to one token. `index` lists
// the channels of the entries.
template <class Real, bool kGather>
__global__ void __launch_bounds__(kCopyThreads)
    copy(const Real* __restrict__ in, const std::int64_t* __restrict__ index, Real* __restrict__ out,
         std::int64_t entries, std::int64_t width, unsigned chunks, bool in_aligned, bool out_aligned) {
  constexpr int kEntries = kCopyThreads / kParts<Real>;
  const int part = static_cast<int>(threadIdx.x) % kParts<Real> * kPack<Real>;
  const std::int64_t n = blockIdx.x / chunks;
  const std::int64_t e = std::int64_t{blockIdx.x % chunks} * kEntries + threadIdx.x / kParts<Real>;
  if (e >= entries) return;
  const std::int64_t* channels = index == nullptr ? nullptr : index + n * entries;
  const std::int64_t c = channels == nullptr ? e : channels[e];
  const std::int64_t listed = (n * entries + e) * kTangentLanes + part;
  const std::int64_t dense = (n * width + c) * kTangentLanes + part;
  if constexpr (kGather) {
    store(out + listed, load(in + dense, in_aligned), out_aligned);
  } else {
    if (channels != nullptr && e > 0 && channels[e - 1] == c) return;
    Pack<Real> sum = load(out + dense, out_aligned);
    add(sum, Real(1), load(in + listed, in_aligned));
    for (std::int64_t f = 1; channels != nullptr && e + f < entries && channels[e + f] == c; ++f) {
      add(sum, Real(1), load(in + listed + f * kTangentLanes, in_aligned));
    }
    store(out + dense, sum, out_aligned);
  }
}

template <class Real, bool kGather>
void start_copy(const Real* in, const std::int64_t* index, Real* out, std::int64_t tokens,
                std::int64_t entries, std::int64_t width, const CudaQueue& queue) {
  const device::OnDevice on(queue);
  const std::int64_t chunks = pieces(entries, kCopyThreads / kParts<Real>);
  device::launch(copy<Real, kGather>, grid_of(tokens * chunks), dim3(kCopyThreads), 0, queue, in, index, out,
                 entries, width, static_cast<unsigned>(chunks), aligned(in), aligned(out));
}

// Transposes between rows (count, n) and lanes (n, 16), n = tokens * channels, in pieces of kTurned along n.
template <class Real, bool kToLanes>
__global__ void __launch_bounds__(kCopyThreads)
    turn(const Real* __restrict__ from, Real* __restrict__ to, std::int64_t n, int count) {
  SCALPEL_DYNAMIC_SHARED(memory);
  constexpr int kStep = kTurned + 1;
  auto* const tile = reinterpret_cast<Real*>(memory);  // (16, kStep)
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kTurned;
  const auto here = static_cast<int>(min(std::int64_t{kTurned}, n - begin));
#pragma unroll
  for (int i = thread; i < kTurned * kTangentLanes; i += kCopyThreads) {
    if constexpr (kToLanes) {
      const int row = i / kTurned, at = i % kTurned;
      tile[row * kStep + at] = row < count && at < here ? from[row * n + begin + at] : Real(0);
    } else {
      const int at = i / kTangentLanes, row = i % kTangentLanes;
      if (at < here) tile[row * kStep + at] = from[begin * kTangentLanes + i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = thread; i < kTurned * kTangentLanes; i += kCopyThreads) {
    if constexpr (kToLanes) {
      const int at = i / kTangentLanes, row = i % kTangentLanes;
      if (at < here) to[begin * kTangentLanes + i] = tile[row * kStep + at];
    } else {
      const int row = i / kTurned, at = i % kTurned;
      if (row < count && at < here) to[row * n + begin + at] = tile[row * kStep + at];
    }
  }
}

template <bool kToLanes>
void run_turn(const TensorView& rows, const TensorView& lanes, const CudaQueue& queue) {
  const DType dtype = jvp::check_turn(rows, lanes);
  const std::int64_t n = rows.shape[1] * rows.shape[2];
  if (n == 0 || (!kToLanes && rows.shape[0] == 0)) return;
  const device::OnDevice on(queue);
  jvp::for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    Real* const of_rows = jvp::data<Real>(rows);
    Real* const of_lanes = jvp::data<Real>(lanes);
    device::launch(turn<Real, kToLanes>, grid_of(pieces(n, kTurned)), dim3(kCopyThreads),
                   kTangentLanes * (kTurned + 1) * sizeof(Real), queue, kToLanes ? of_rows : of_lanes,
                   kToLanes ? of_lanes : of_rows, n, static_cast<int>(rows.shape[0]));
  });
}

}  // namespace

void norm_jvp(const Norm& norm, const TensorView& in, const TensorView& out, const TensorView& out_index,
              const CudaQueue& queue) {
  const DType dtype = jvp::check_norm_jvp(norm, in, out, out_index, jvp::Contents::kTrusted);
  if (out.shape[0] == 0 || out.shape[1] == 0) return;
  jvp::for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    const auto from = jvp::rows_of<const Real>(in, TensorView{.ndim = 0});
    const auto to = jvp::rows_of<Real>(out, out_index);
    start_norm(norm_forward<Real>, norm_job(norm, from, to, to.index, to.entries), out.shape[0], from.lanes,
               to.lanes, queue);
  });
}

void norm_vjp(const Norm& norm, const TensorView& in, const TensorView& in_index, const TensorView& out,
              const CudaQueue& queue) {
  const DType dtype = jvp::check_norm_vjp(norm, in, in_index, out, jvp::Contents::kTrusted);
  if (in.shape[0] == 0 || in.shape[1] == 0) return;
  jvp::for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    const auto from = jvp::rows_of<const Real>(in, in_index);
    const auto to = jvp::rows_of<Real>(out, TensorView{.ndim = 0});
    start_norm(norm_backward<Real>, norm_job(norm, from, to, from.index, from.entries), in.shape[0],
               from.lanes, to.lanes, queue);
  });
}

void gather_lanes(const TensorView& in, const TensorView& out, const TensorView& index,
                  const CudaQueue& queue) {
  const DType dtype = jvp::check_gather(in, out, index, jvp::Contents::kTrusted);
  if (out.shape[0] == 0 || out.shape[1] == 0) return;
  jvp::for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    const auto to = jvp::rows_of<Real>(out, index);
    start_copy<Real, true>(jvp::data<const Real>(in), to.index, to.lanes, out.shape[0], to.entries,
                           in.shape[1], queue);
  });
}

void scatter_lanes(const TensorView& in, const TensorView& index, const TensorView& out,
                   const CudaQueue& queue) {
  const DType dtype = jvp::check_scatter(in, index, out, jvp::Contents::kTrusted);
  if (in.shape[0] == 0 || in.shape[1] == 0) return;
  jvp::for_dtype(dtype, [&](auto real) {
    using Real = decltype(real);
    const auto from = jvp::rows_of<const Real>(in, index);
    start_copy<Real, false>(from.lanes, from.index, jvp::data<Real>(out), in.shape[0], from.entries,
                            out.shape[1], queue);
  });
}

void rows_to_lanes(const TensorView& rows, const TensorView& lanes, const CudaQueue& queue) {
  run_turn<true>(rows, lanes, queue);
}

void lanes_to_rows(const TensorView& lanes, const TensorView& rows, const CudaQueue& queue) {
  run_turn<false>(rows, lanes, queue);
}

}  // namespace scalpel::cuda
