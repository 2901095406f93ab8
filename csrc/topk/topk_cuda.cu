// TopK on a GPU: a warp a row up to 1024 entries, a block a row above.
//
// A row is read once: its first entries stay in registers, the next in shared memory; only what neither holds
// (of float32 beyond 70,000 entries, say) is read again in every step. The k-th largest key is searched by
// bisection between the row's least and largest key: a step counts the keys from a candidate on. It ends as
// soon as exactly k are counted, which rows without ties do after some fifteen steps; rows of equal keys
// begin with least = largest. A row with ties at the k-th key goes through its entries in order once more, to
// keep the first of them. All of it is integer arithmetic on counts, so that the bits are the CPU's.
#include <algorithm>
#include <cstdint>

#include "../cuda/rows.h"
#include "check.h"
#include "topk_cuda.h"
#include "topk_row_cuda.h"

namespace scalpel::cuda {
namespace {

using namespace topk;

template <class Bits, Order kOrder, class Group, int kHeld, int kVector, Result kResult, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) rank_rows(Job job, int vectors, int shared_vectors) {
  using R = Row<Bits, kOrder, Group, kHeld, kVector>;
  SCALPEL_DYNAMIC_SHARED(memory);
  Group group(reinterpret_cast<unsigned*>(memory));
  auto* shared =
      reinterpret_cast<typename R::Vec*>(memory + (Group::kWords * sizeof(unsigned) + 15) / 16 * 16);

  for (std::int64_t row = group.first_row(); row < job.rows; row += group.row_step()) {
    const auto* x = static_cast<const Bits*>(job.x) + job.x_rows.offset(row);
    const std::int64_t to = job.out_rows.offset(row);
    R r{group,
        {static_cast<typename R::Key>(job.infinity), job.by_value},
        x,
        shared,
        shared_vectors,
        vectors,
        job.width,
        {}};
    r.load();
    typename R::Key threshold = 0;
    unsigned equal = 0;
    if (job.k > 0) r.search(static_cast<unsigned>(job.k), threshold, equal);
    // Which of a vector's entries are kept, as bits; `seen` and `put` run over the vectors before.
    unsigned seen = 0, put = 0;
    const bool ordered = equal != 0xFFFFFFFFu && job.k > 0;  // the same for the whole group
    r.each([&](int at, const typename R::Vec& vec) {
      unsigned kept = 0, ties = 0;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const auto key = r.keys.of(vec.entry[e]);
        if (at + e >= job.width || job.k == 0) continue;
        kept |= (ordered ? key > threshold : key >= threshold) ? 1u << e : 0u;
        ties |= ordered && key == threshold ? 1u << e : 0u;
      }
      if (ordered) {
        unsigned total;
        unsigned rank = seen + group.before(static_cast<unsigned>(__popc(ties)), total);
        seen += total;
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if ((ties >> e & 1u) != 0 && rank++ < equal) kept |= 1u << e;
        }
      }
      if constexpr (kResult == Result::kIndex) {
        unsigned total;
        unsigned rank = put + group.before(static_cast<unsigned>(__popc(kept)), total);
        put += total;
        auto* out = static_cast<std::int64_t*>(job.out) + to;
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if (kept >> e & 1u) out[rank++] = at + e;
        }
      } else if (at < job.width) {
        using Out = std::conditional_t<kResult == Result::kMask, std::uint8_t, Bits>;
        Vector<Out, kVector> out;
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const bool keep = (kept >> e & 1u) != 0;
          out.entry[e] = kResult == Result::kMask ? static_cast<Out>(keep)
                         : keep                   ? static_cast<Out>(vec.entry[e])
                                                  : Out{0};
        }
        *reinterpret_cast<Vector<Out, kVector>*>(static_cast<Out*>(job.out) + to + at) = out;
      }
    });
    group.end_row();  // shared memory is the next row's
  }
}

template <class Bits, Order kOrder, int kVector, Result kResult>
void start(const Job& job, const CudaQueue& queue) {
  // Entries in a thread's registers: those of 128 bytes; single ones, whose addresses take room too, half as
  // many.
  constexpr int kEntries = (sizeof(Bits) == 8 ? 16 : 32) / (kVector == 1 ? 2 : 1);
  constexpr int kHeld = kEntries / kVector;
  const auto many = [&](std::int64_t groups, int per_block) {
    return dim3(
        static_cast<unsigned>(std::min<std::int64_t>((groups + per_block - 1) / per_block, 0x7FFFFFFF)));
  };
  if (job.width <= 32 * kEntries) {
    const int vectors = kHeld;
    device::launch(rank_rows<Bits, kOrder, WarpGroup, kHeld, kVector, kResult, 128>,
                   many(job.rows, WarpGroup::kPerBlock), dim3(128), 0, queue, job, vectors, 0);
    return;
  }
  // Half as many entries a thread as a warp's row has: of 1024 threads each may have 64 registers.
  constexpr int kBlockHeld = kHeld / 2 > 0 ? kHeld / 2 : 1;
  int threads = 64;
  while (threads < 1024 && job.width > threads * kBlockHeld * kVector) threads *= 2;
  const int vectors = std::max(kBlockHeld, (job.width + threads * kVector - 1) / (threads * kVector));
  const std::size_t words = (BlockGroup::kWords * sizeof(unsigned) + 15) / 16 * 16;
  const std::size_t slot = sizeof(Bits) * kVector * threads;
  int shared_vectors = 0;
  if (vectors > kBlockHeld) {
    const std::size_t room = (device::most_shared() - words) / slot;
    shared_vectors =
        static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(vectors - kBlockHeld), room));
  }
  device::launch(rank_rows<Bits, kOrder, BlockGroup, kBlockHeld, kVector, kResult, 1024>, many(job.rows, 1),
                 dim3(static_cast<unsigned>(threads)),
                 words + static_cast<std::size_t>(shared_vectors) * slot, queue, job, vectors,
                 shared_vectors);
}

bool aligned(const void* data, const Rows& rows, std::int64_t bytes, std::int64_t item) {
  if (reinterpret_cast<std::uintptr_t>(data) % bytes != 0) return false;
  for (int i = 0; i < rows.dims; ++i) {
    if (rows.strides[i] * item % bytes != 0) return false;
  }
  return true;
}

template <class Bits, Order kOrder, Result kResult>
void pick_vector(const Job& job, const CudaQueue& queue) {
  constexpr int kVector = 16 / sizeof(Bits);
  constexpr std::int64_t kOut = kResult == Result::kMask ? 1 : sizeof(Bits);
  const bool whole = job.width % kVector == 0 && aligned(job.x, job.x_rows, 16, sizeof(Bits)) &&
                     (kResult == Result::kIndex || aligned(job.out, job.out_rows, kOut * kVector, kOut));
  if (whole) {
    start<Bits, kOrder, kVector, kResult>(job, queue);
  } else {
    start<Bits, kOrder, 1, kResult>(job, queue);
  }
}

template <Result kResult>
void run(const TensorView& x, std::int64_t k, RankBy by, const TensorView& out, const CudaQueue& queue) {
  const std::int64_t width = x.width();
  check_topk(x, k, out,
             kResult == Result::kMask   ? TopKOutput::kMask
             : kResult == Result::kKept ? TopKOutput::kKept
                                        : TopKOutput::kIndex);
  if (width >= std::int64_t{1} << 30) {
    throw std::invalid_argument("x has rows of " + std::to_string(width) +
                                " entries; on a GPU fewer than 2^30 are allowed");
  }
  if (topk_empty(x) || topk_empty(out)) return;
  const device::OnDevice on(queue);
  const auto with = [&](auto bits, std::uint64_t infinity) {
    using Bits = decltype(bits);
    const Job job{x.data,
                  out.data,
                  device::rows_of(x, "x"),
                  device::rows_of(out, "out"),
                  x.rows(),
                  static_cast<int>(width),
                  static_cast<int>(k),
                  infinity,
                  by == RankBy::kValue};
    if constexpr (kResult == Result::kKept) {
      if (job.by_value) return pick_vector<Bits, Order::kValue, kResult>(job, queue);
      return pick_vector<Bits, Order::kMagnitude, kResult>(job, queue);
    } else {
      return pick_vector<Bits, Order::kEither, kResult>(job, queue);
    }
  };
  switch (x.dtype) {
    case DType::kFloat16:
      return with(std::uint16_t{}, 0x7C00);
    case DType::kBFloat16:
      return with(std::uint16_t{}, 0x7F80);
    case DType::kFloat32:
      return with(std::uint32_t{}, 0x7F800000);
    default:
      return with(std::uint64_t{}, 0x7FF0000000000000);
  }
}

}  // namespace

void topk_mask(const TensorView& x, std::int64_t k, RankBy by, const TensorView& mask,
               const CudaQueue& queue) {
  run<Result::kMask>(x, k, by, mask, queue);
}
void keep_topk(const TensorView& x, std::int64_t k, RankBy by, const TensorView& kept,
               const CudaQueue& queue) {
  run<Result::kKept>(x, k, by, kept, queue);
}
void topk_indices(const TensorView& x, std::int64_t k, RankBy by, const TensorView& index,
                  const CudaQueue& queue) {
  run<Result::kIndex>(x, k, by, index, queue);
}

}  // namespace scalpel::cuda
