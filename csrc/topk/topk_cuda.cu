// TopK on a GPU: one warp per row where each lane can hold its share of the row in registers, otherwise one
// block per row.
//
// A row is read once: its first entries stay in registers, the next ones in shared memory. The search for
// the k-th largest key guesses a key and counts the keys that reach it, about ten times
// (benches/topk_counts.py). It ends as soon as a count is exactly k, and rows of equal keys end it at once.
// Rows that fit neither registers nor shared memory (float32 rows beyond about 65,536 entries) have their
// remainder read again by each step of the search and when the output is written; a step of that search
// distinguishes 1024 ranges of keys, so three steps suffice. A row with ties at the k-th key is traversed
// once more in order, to keep the first of them. All decisions are integer arithmetic on counts (floats only
// produce guesses), so the bits equal the CPU's.
#include <algorithm>
#include <cstdint>

#include "../cuda/rows.h"
#include "check.h"
#include "topk_cuda.h"
#include "topk_row_cuda.h"

namespace scalpel::cuda {
namespace {

using namespace topk;

// Dynamic shared memory begins with the group's words. A wide row's bins start at byte `bins_at`, and the
// part of the row that is held in shared memory at byte `row_at`.
template <class Bits, Order kOrder, class Group, int kHeld, int kVector, Result kResult, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    rank_rows(Job job, int vectors, int shared_vectors, int bins_at, int row_at) {
  using R = Row<Bits, kOrder, Group, kHeld, kVector>;
  using Key = typename R::Key;
  SCALPEL_DYNAMIC_SHARED(memory);
  Group group(reinterpret_cast<unsigned*>(memory));

  for (std::int64_t row = group.first_row(); row < job.rows; row += group.row_step()) {
    const auto* x = static_cast<const Bits*>(job.x) + job.x_rows.offset(row);
    const std::int64_t to = job.out_rows.offset(row);
    R r{group,
        {static_cast<Key>(job.infinity), job.by_value},
        x,
        reinterpret_cast<typename R::Vec*>(memory + row_at),
        shared_vectors,
        vectors,
        job.width,
        {}};
    r.load();
    Cut<Key> cut{r.keys.beyond(), kAllEqual};
    if constexpr (Group::kWide) {
      if (job.k > 0 && r.wide())
        cut = r.search_wide(static_cast<unsigned>(job.k), reinterpret_cast<unsigned*>(memory + bins_at));
    }
    if (job.k > 0 && !r.wide()) cut = r.search(static_cast<unsigned>(job.k));
    const bool ordered = cut.equal != kAllEqual;  // uniform over the group
    const Key from = ordered ? r.keys.after(cut.threshold) : cut.threshold;
    // `kept` is a bit set of a vector's kept entries; `seen` and `put` count ties and kept entries in
    // earlier vectors.
    unsigned seen = 0, put = 0;
    r.each([&](int at, const typename R::Vec& vec) {
      const bool there = at < job.width;
      unsigned kept = 0;
#pragma unroll
      for (int e = 0; e < kVector; ++e) kept |= there && r.keys.reaches(vec.entry[e], from) ? 1u << e : 0u;
      if (ordered) {
        unsigned ties = 0, total;
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          ties |= there && r.keys.of(vec.entry[e]) == cut.threshold ? 1u << e : 0u;
        }
        unsigned rank = seen + group.before(static_cast<unsigned>(__popc(ties)), total);
        seen += total;
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if ((ties >> e & 1u) != 0 && rank++ < cut.equal) kept |= 1u << e;
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
      } else if (there) {
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
    group.end_row();  // the next row reuses the shared memory
  }
}

template <class Bits, Order kOrder, int kVector, Result kResult>
void start(const Job& job, const CudaQueue& queue) {
  // The number of entries in a thread's registers: 32 in vectors. Single entries take registers for their
  // addresses too, so it is 8 of them, or 4 of float64.
  constexpr int kEntries = kVector > 1 ? 32 : sizeof(Bits) == 8 ? 4 : 8;
  constexpr int kHeld = kEntries / kVector;
  const auto many = [&](std::int64_t groups, int per_block) {
    return dim3(
        static_cast<unsigned>(std::min<std::int64_t>((groups + per_block - 1) / per_block, 0x7FFFFFFF)));
  };
  if (job.width <= 32 * kEntries) {
    device::launch(rank_rows<Bits, kOrder, WarpGroup, kHeld, kVector, kResult, 128>,
                   many(job.rows, WarpGroup::kPerBlock), dim3(128), 0, queue, job, kHeld, 0, 0, 0);
    return;
  }
  // Half as many entries per thread as in a warp's row, because a thread of a 1024-thread block has at most
  // 64 registers.
  constexpr int kBlockHeld = kHeld / 2 > 0 ? kHeld / 2 : 1;
  using R = Row<Bits, kOrder, BlockGroup, kBlockHeld, kVector>;
  constexpr std::size_t kWords = (BlockGroup::kWords * sizeof(unsigned) + 15) / 16 * 16;
  const auto vectors_of = [&](int threads) {
    return std::max(kBlockHeld, (job.width + threads * kVector - 1) / (threads * kVector));
  };
  const auto slot = [](int threads) { return sizeof(Bits) * kVector * static_cast<std::size_t>(threads); };
  const auto needed = [&](int threads) {
    return kWords + static_cast<std::size_t>(vectors_of(threads) - kBlockHeld) * slot(threads);
  };
  int threads = 64;
  while (threads < 512 && vectors_of(threads) > kBlockHeld) threads *= 2;
  // Prefer two blocks on a multiprocessor, so that one reads or writes while the other counts; if they do
  // not fit, use one block with all its threads.
  const std::size_t room = device::most_shared();
  if (needed(threads) > room / 2 - 1024) threads = 1024;
  int shared_vectors = vectors_of(threads) - kBlockHeld;
  std::size_t bins = 0;
  if (needed(threads) > room) {
    bins = sizeof(unsigned) * R::kBins * R::kCopies;
    shared_vectors = static_cast<int>((room - kWords - bins) / slot(threads));
  }
  device::launch(rank_rows<Bits, kOrder, BlockGroup, kBlockHeld, kVector, kResult, 1024>, many(job.rows, 1),
                 dim3(static_cast<unsigned>(threads)),
                 kWords + bins + static_cast<std::size_t>(shared_vectors) * slot(threads), queue, job,
                 vectors_of(threads), shared_vectors, static_cast<int>(kWords),
                 static_cast<int>(kWords + bins));
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
  // float64 is read one entry at a time, which still fills whole cache lines and halves the number of
  // kernels to compile for a rare case.
  constexpr int kVector = sizeof(Bits) == 8 ? 1 : 16 / sizeof(Bits);
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
