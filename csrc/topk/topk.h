// TopK along the last dimension: the contract of every target.
//
//   x     (..., width)  float16, bfloat16, float32 or float64; last stride 1, any strides before it
//   k     0 <= k <= width
//   by    kMagnitude ranks |x|, kValue ranks x
//   mask  (..., width)  bool, true at the k kept places of each row
//   kept  (..., width)  like x: x where kept, +0 elsewhere; what is kept keeps every bit
//   index (..., k)      int64, the kept places in ascending order
//
// Order. NaN ranks above every number, whatever its sign, and all NaNs are equal; infinity is the largest
// number; -0 equals +0. Among equals the lower index wins. So exactly k are kept in every row, and the result
// is the same to the bit for every target and any number of threads: only integer comparisons decide.
//
// Memory. Outputs have the shape above, last stride 1 and no two elements in one place. `kept` may be x
// itself (same address and strides); any other overlap with x is refused.
//
// Cost. A row is read from memory once, to count and to collect the few keys that may be the k-th largest,
// once more from cache, and written once; an output of 32 MiB or more is written past the caches. A row that
// the guess misses is read again, twice at most (select.inc). Scratch: two rows of keys a thread.
//
// Errors: std::invalid_argument that names what was given and what is allowed (DTypeError, derived from it,
// for a dtype); nothing is written then. Thread-safe. `threads` is the most threads to use, 0 for OpenMP's
// own choice.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor_view.h"

namespace scalpel {

enum class RankBy : std::uint8_t { kMagnitude, kValue };

void topk_mask(const TensorView& x, std::int64_t k, RankBy by, const TensorView& mask, int threads = 0);
void keep_topk(const TensorView& x, std::int64_t k, RankBy by, const TensorView& kept, int threads = 0);
void topk_indices(const TensorView& x, std::int64_t k, RankBy by, const TensorView& index, int threads = 0);

// For tests: the target that this copy of the kernels was compiled for, read from the macros that the
// compiler predefined in its file (nullptr if not built), and how many blocks of rows it has processed so
// far.
const char* topk_compiled_for(Target target);
std::uint64_t topk_calls(Target target);

}  // namespace scalpel
