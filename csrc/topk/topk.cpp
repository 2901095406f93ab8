// Checks the arguments, picks a target and hands it blocks of rows.
#include "topk/topk.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/memory.h"
#include "core/parallel.h"
#include "topk/check.h"
#include "topk/kernel.h"

namespace scalpel {
namespace {

const TopKKernels* kernels_of(Target target) {
  switch (target) {
#if defined(SCALPEL_X86_TARGETS)
    case Target::kAvx512Vbmi2:
      return &topk_avx512vbmi2();
    case Target::kAvx512:
      return &topk_avx512();
    case Target::kAvx2:
      return &topk_avx2();
#endif
    case Target::kPortable:
      return &topk_portable();
    default:
      return nullptr;
  }
}

// Neither k = 0 nor k = width needs any ranking; a row of width 0 falls under both.
bool is_trivial(const TensorView& x, std::int64_t k) { return k == 0 || k == x.width(); }

void fill_trivial(const TensorView& x, std::int64_t k, const TensorView& out, TopKOutput output,
                  std::int64_t r) {
  const std::int64_t n = x.width();
  const std::int64_t size = item_size(out.dtype);
  char* const to = static_cast<char*>(out.data) + out.row_offset(r) * size;
  if (output == TopKOutput::kIndex) {
    for (std::int64_t i = 0; i < k; ++i) reinterpret_cast<std::int64_t*>(to)[i] = i;
  } else if (output == TopKOutput::kMask || k == 0) {
    std::memset(to, k == 0 ? 0 : 1, static_cast<std::size_t>(n * size));
  } else {
    const char* from = static_cast<const char*>(x.data) + x.row_offset(r) * size;
    std::memmove(to, from, static_cast<std::size_t>(n * size));
  }
}

// An output of this size has left the last-level cache before anybody reads it.
constexpr std::int64_t kStreamBytes = std::int64_t{32} << 20;

// Rows that share cache lines with their neighbours are streamed only if they are long: writing half a cache
// line past the caches and the other half through them is slower than either.
bool worth_streaming(const TensorView& out, TopKOutput output) {
  const std::int64_t size = item_size(out.dtype);
  if (output == TopKOutput::kIndex || out.rows() * out.width() * size < kStreamBytes) return false;
  bool whole_lines = reinterpret_cast<std::uintptr_t>(out.data) % 64 == 0 && out.width() * size % 64 == 0;
  for (int i = 0; i + 1 < out.ndim; ++i) whole_lines = whole_lines && out.strides[i] * size % 64 == 0;
  return whole_lines || out.width() * size >= 4096;
}

// Scratch memory for each thread, on cache lines of its own.
class Scratch {
 public:
  Scratch(std::int64_t line, int threads)
      : line_(line), memory_(static_cast<char*>(::operator new(line * threads, kAlignment))) {
    prefer_huge_pages(memory_, line * threads);
    for (int t = 0; t < threads; ++t) std::memset(of(t), 0, kTopKMemoryBytes);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(memory_, kAlignment); }
  char* of(int thread) const { return memory_ + line_ * thread; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  std::int64_t line_;
  char* memory_;
};

void run_block(const TopKKernels& kernels, const TopKBlock& block, TopKOutput output, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return kernels.run16(block, output, 0x7c00);
    case DType::kBFloat16:
      return kernels.run16(block, output, 0x7f80);
    case DType::kFloat32:
      return kernels.run32(block, output, 0x7f800000);
    default:
      return kernels.run64(block, output, 0x7ff0000000000000);
  }
}

void run(const TensorView& x, std::int64_t k, RankBy by, const TensorView& out, TopKOutput output,
         int threads) {
  check_topk(x, k, out, output);
  if (topk_empty(x) || topk_empty(out)) return;  // the index tensor for k = 0 has no memory
  const std::int64_t rows = x.rows();
  const std::int64_t width = x.width();
  const std::int64_t size = item_size(x.dtype);
  threads = threads_for(rows * width, threads);
  const std::int64_t grain = std::max<std::int64_t>(1, std::min(rows / (4 * threads), 65536 / width));

  if (is_trivial(x, k)) {
    auto fill = [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t r = begin; r < end; ++r) fill_trivial(x, k, out, output, r);
    };
    parallel_for(rows, grain, threads, fill);
    return;
  }

  const TopKKernels& kernels = *kernels_of(active_target().target);
  // Allocated outside the parallel loop, because the loop must not throw.
  const std::int64_t line = topk_scratch_bytes(width, size);
  threads = static_cast<int>(std::min<std::int64_t>(threads, (rows + grain - 1) / grain));
  const Scratch scratch(line, threads);
  const bool uniform = x.uniform_rows() && out.uniform_rows();
  const bool stream = worth_streaming(out, output);

  auto body = [&](std::int64_t begin, std::int64_t end, int thread) {
    const std::int64_t step = uniform ? end - begin : 1;
    for (std::int64_t r = begin; r < end; r += step) {
      TopKBlock block;
      block.x = static_cast<const char*>(x.data) + x.row_offset(r) * size;
      block.x_stride = x.row_stride();
      block.out = static_cast<char*>(out.data) + out.row_offset(r) * item_size(out.dtype);
      block.out_stride = out.row_stride();
      block.rows = step;
      block.width = width;
      block.k = k;
      block.by_value = by == RankBy::kValue;
      block.stream = stream;
      block.scratch = scratch.of(thread);
      run_block(kernels, block, output, x.dtype);
    }
  };
  parallel_for(rows, grain, threads, body);
}

}  // namespace

void topk_mask(const TensorView& x, std::int64_t k, RankBy by, const TensorView& mask, int threads) {
  run(x, k, by, mask, TopKOutput::kMask, threads);
}

void keep_topk(const TensorView& x, std::int64_t k, RankBy by, const TensorView& kept, int threads) {
  run(x, k, by, kept, TopKOutput::kKept, threads);
}

void topk_indices(const TensorView& x, std::int64_t k, RankBy by, const TensorView& index, int threads) {
  run(x, k, by, index, TopKOutput::kIndex, threads);
}

const char* topk_compiled_for(Target target) {
  const TopKKernels* kernels = kernels_of(target);
  return kernels == nullptr ? nullptr : kernels->compiled_for;
}

std::uint64_t topk_calls(Target target) {
  const TopKKernels* kernels = kernels_of(target);
  return kernels == nullptr ? 0 : __atomic_load_n(kernels->calls, __ATOMIC_RELAXED);
}

}  // namespace scalpel
