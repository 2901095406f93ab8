// The interface between topk.cpp and the targets' files. Internal: the kernels take raw pointers and sizes,
// because topk.cpp has already checked everything.
#pragma once

#include <cstdint>

#include "topk/check.h"

namespace scalpel {

// A block of rows. Consecutive rows lie `x_stride` and `out_stride` elements apart.
struct TopKBlock {
  const void* x;
  std::int64_t x_stride;
  void* out;
  std::int64_t out_stride;
  std::int64_t rows;
  std::int64_t width;
  std::int64_t k;
  bool by_value;
  bool stream;    // bypass the caches when writing, because the output is larger than they are
  void* scratch;  // per thread: topk_scratch_bytes(), 64-byte aligned, zeroed before its first block
};

// Scratch holds what a thread remembers from row to row (kTopKMemoryBytes), and two lines of keys, each with
// room for one vector beyond its end.
constexpr std::int64_t kTopKMemoryBytes = 64;
constexpr std::int64_t topk_line_bytes(std::int64_t width, std::int64_t item_size) {
  return (width * item_size + 2 * 64 + 63) / 64 * 64;
}
constexpr std::int64_t topk_scratch_bytes(std::int64_t width, std::int64_t item_size) {
  return kTopKMemoryBytes + 2 * topk_line_bytes(width, item_size);
}

struct TopKKernels {
  const char* compiled_for;
  std::uint64_t* calls;
  // One function per element width. `infinity` is the bit pattern of +inf; it is the only thing that
  // distinguishes float16 from bfloat16.
  void (*run16)(const TopKBlock&, TopKOutput, std::uint16_t infinity);
  void (*run32)(const TopKBlock&, TopKOutput, std::uint32_t infinity);
  void (*run64)(const TopKBlock&, TopKOutput, std::uint64_t infinity);
};

const TopKKernels& topk_portable();
const TopKKernels& topk_avx2();
const TopKKernels& topk_avx512();
const TopKKernels& topk_avx512vbmi2();

}  // namespace scalpel
