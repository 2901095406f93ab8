// TopK along the last dimension: the contract of every target.
//
//   x     (..., width)  float16, bfloat16, float32 or float64; last stride 1, any other strides
//   k     0 <= k <= width
//   by    kMagnitude ranks |x|, kValue ranks x
//   mask  (..., width)  bool, true at the k kept places of each row
//   kept  (..., width)  dtype of x: x where it is kept, +0 elsewhere; kept values are copied bit by bit
//   index (..., k)      int64, the kept places in ascending order
//
// Order. NaN ranks above every number, whatever its sign, and all NaNs are equal; infinity is the largest
// number; -0 equals +0. Among equal values the lower index wins. Every row therefore keeps exactly k values.
// The result is identical to the bit on every target and for any number of threads, because only integer
// comparisons decide.
//
// Memory. Outputs have the shapes above and last stride 1, and no two of their elements share an address.
// `kept` may be x itself (same address and strides); any other overlap with x is an error.
//
// Cost. A row is read once from memory, to count keys and collect the few that may be the k-th largest; it
// is read once more from cache, and the output is written once. Outputs of 32 MiB or more are written past
// the caches. When the guess for a row fails, the row is read again, at most twice (select.inc). Scratch:
// two rows of keys per thread.
//
// Errors: std::invalid_argument that names what was given and what is allowed (its subclass DTypeError for a
// dtype); nothing has been written then. Thread-safe. `threads` is the largest number of threads to use, 0
// for OpenMP's own choice.
#pragma once

#include <cstdint>

#include "../core/dispatch.h"
#include "../core/tensor_view.h"

namespace scalpel {

enum class RankBy : std::uint8_t { kMagnitude, kValue };

void topk_mask(const TensorView& x, std::int64_t k, RankBy by, const TensorView& mask, int threads = 0);
void keep_topk(const TensorView& x, std::int64_t k, RankBy by, const TensorView& kept, int threads = 0);
void topk_indices(const TensorView& x, std::int64_t k, RankBy by, const TensorView& index, int threads = 0);

// For tests: the target for which this copy of the kernels was compiled, read from the macros that the
// compiler predefines (nullptr if the target was not built), and how many blocks of rows it has processed so
// far.
const char* topk_compiled_for(Target target);
std::uint64_t topk_calls(Target target);

}  // namespace scalpel
