// Attention on lanes on a GPU: the checks, and the sums that each rule asks of the kernel in
// attention_sweep.h. Nothing waits for the device, so an index that does not ascend or that names no channel
// goes unnoticed. Such a call reads and writes nothing outside the arrays, but its result is meaningless.
#include "attention_sweep.h"
#include "jvp/attention_checks.h"
#include "jvp_cuda.h"

namespace scalpel::cuda {
namespace {

using jvp::absent;
using jvp::AttentionSizes;

template <class Real>
AttentionPrimal<Real> primal_of(const Attention& at, const AttentionSizes& sizes) {
  AttentionPrimal<Real> primal;
  primal.q = jvp::data<const Real>(at.q);
  primal.k = jvp::data<const Real>(at.k);
  primal.v = jvp::data<const Real>(at.v);
  primal.y = jvp::data<const Real>(at.y);
  primal.allowed = jvp::data<const std::uint8_t>(at.allowed);
  primal.sink = absent(at.sink) ? nullptr : jvp::data<const Real>(at.sink);
  primal.mask_step = at.allowed.shape[0] == 1 ? 0 : sizes.length * sizes.length;
  primal.length = static_cast<int>(sizes.length);
  primal.scale = static_cast<Real>(at.scale);
  primal.d = static_cast<int>(sizes.d);
  primal.heads = static_cast<int>(at.heads);
  primal.kv_heads = static_cast<int>(at.kv_heads);
  return primal;
}

void expect_small(const AttentionSizes& sizes) {
  if (sizes.width <= 0x7FFFFFFF && sizes.length <= 0x7FFFFFF0) return;
  jvp::refuse("q has " + std::to_string(sizes.length) + " tokens of width " + std::to_string(sizes.width) +
              "; on a GPU fewer than 2^31 of each are allowed");
}

// Lanes without any entry are treated as absent.
template <class Real>
LaneRows<Real> lanes_of(const LanesOf& of) {
  if (absent(of.lanes) || of.lanes.shape[1] == 0) return {nullptr, nullptr, 0};
  return {jvp::data<Real>(of.lanes), absent(of.index) ? nullptr : jvp::data<const std::int64_t>(of.index),
          of.lanes.shape[1]};
}

dim3 blocks(std::int64_t count) {
  if (count > 0x7FFFFFFF)
    jvp::refuse("attention needs " + std::to_string(count) +
                " blocks of a GPU; at most 2^31 - 1 are allowed: use a smaller batch");
  return dim3(static_cast<unsigned>(count));
}

template <bool kByQuery, int kOut, class Real>
void start(const Sweep<Real>& sweep, const AttentionSizes& sizes, const CudaQueue& queue) {
  const std::int64_t tiles = (sizes.length + kRows<Real> - 1) / kRows<Real>;
  const std::int64_t chunks = (sizes.d + kOut - 1) / kOut;
  const std::int64_t heads = kByQuery ? sweep.at.heads : sweep.at.kv_heads;
  device::launch(sweep_columns<Real, kOut, kByQuery>, blocks(sizes.batch * heads * tiles * chunks),
                 dim3(kThreads), sizeof(Shared<Real, kOut>), queue, sweep);
}

template <bool kByQuery, class Real>
void run(const Sweep<Real>& sweep, const AttentionSizes& sizes, const CudaQueue& queue) {
  if (sweep.out.lanes == nullptr) return;
  const bool makes_statistics = !kByQuery && sweep.statistics == nullptr;
  if (sizes.d <= 16 || makes_statistics) {
    start<kByQuery, kMakesStatistics>(sweep, sizes, queue);
  } else {
    start<kByQuery, 64>(sweep, sizes, queue);
  }
}

template <class Real>
void forward(const Attention& at, const AttentionSizes& sizes, const LanesOf& q, const LanesOf& k,
             const LanesOf& v, const LanesOf& y, const CudaQueue& queue) {
  Sweep<Real> sweep{};
  sweep.at = primal_of<Real>(at, sizes);
  sweep.row_lanes = lanes_of<const Real>(q);
  sweep.column_factor = sweep.at.k;
  sweep.column_lanes = lanes_of<const Real>(k);
  sweep.row_factor = sweep.at.q;
  const bool moves = sweep.row_lanes.lanes != nullptr || sweep.column_lanes.lanes != nullptr;
  sweep.column_values = moves ? sweep.at.v : nullptr;
  sweep.column_added = lanes_of<const Real>(v);
  sweep.drift = moves;
  sweep.out = lanes_of<Real>(y);
  run<true>(sweep, sizes, queue);
}

template <class Real>
void backward(const Attention& at, const AttentionSizes& sizes, const LanesOf& y, const LanesOf& q,
              const LanesOf& k, const LanesOf& v, const CudaQueue& queue) {
  const AttentionPrimal<Real> primal = primal_of<Real>(at, sizes);
  const LaneRows<const Real> u = lanes_of<const Real>(y);
  const LaneRows<Real> dq = lanes_of<Real>(q), dk = lanes_of<Real>(k), dv = lanes_of<Real>(v);
  Real* statistics = nullptr;
  if ((dk.lanes != nullptr || dv.lanes != nullptr) && dq.entries * kTangentLanes >= 2 * at.heads) {
    statistics = dq.lanes;
    const std::int64_t tiles = (sizes.length + kScoreRows - 1) / kScoreRows;
    device::launch(write_statistics<Real>, blocks(sizes.batch * at.heads * tiles), dim3(kThreads), 0, queue,
                   primal, statistics);
  }
  Sweep<Real> to_v{};
  to_v.at = primal;
  to_v.column_added = u;
  to_v.statistics = statistics;
  to_v.out = dv;
  run<false>(to_v, sizes, queue);

  Sweep<Real> to_k{};
  to_k.at = primal;
  to_k.column_lanes = u;
  to_k.row_factor = primal.v;
  to_k.along = true;
  to_k.column_values = primal.q;
  to_k.statistics = statistics;
  to_k.out = dk;
  run<false>(to_k, sizes, queue);

  // This sweep runs last, because it overwrites the statistics.
  Sweep<Real> to_q{};
  to_q.at = primal;
  to_q.row_lanes = u;
  to_q.column_factor = primal.v;
  to_q.along = true;
  to_q.column_values = primal.k;
  to_q.out = dq;
  run<true>(to_q, sizes, queue);
}

}  // namespace

void attention_jvp(const Attention& at, const LanesOf& q, const LanesOf& k, const LanesOf& v,
                   const TensorView& y, const CudaQueue& queue) {
  const AttentionSizes sizes = jvp::check_attention(at, q, k, v, y, jvp::Contents::kTrusted);
  expect_small(sizes);
  if (sizes.tokens() == 0 || sizes.d == 0) return;
  const device::OnDevice on(queue);
  const LanesOf all{y, TensorView{.ndim = 0}};
  jvp::for_dtype(sizes.dtype, [&](auto real) { forward<decltype(real)>(at, sizes, q, k, v, all, queue); });
}

void attention_vjp(const Attention& at, const TensorView& y, const LanesOf& q, const LanesOf& k,
                   const LanesOf& v, const CudaQueue& queue) {
  const AttentionSizes sizes = jvp::check_attention(at, q, k, v, y, jvp::Contents::kTrusted);
  expect_small(sizes);
  if (sizes.tokens() == 0 || sizes.d == 0) return;
  const device::OnDevice on(queue);
  const LanesOf all{y, TensorView{.ndim = 0}};
  jvp::for_dtype(sizes.dtype, [&](auto real) { backward<decltype(real)>(at, sizes, all, q, k, v, queue); });
}

}  // namespace scalpel::cuda
