// What reads the rows of a covariance on a GPU; the rest of a state is torch's, in
// python/scalpel/covariance/on_device.py. Nothing is waited for and nothing is allocated. The bits depend on
// nothing but the arguments. Errors: std::invalid_argument (DTypeError for a dtype).
//
// gram_lower: the Gram matrix of rows, added to a scatter in float64.
//
//   x        (rows, dim)  float16, bfloat16 or float32; last stride 1, any row stride; finite
//   shift    (dim,)       float32, taken off every row in float32 before all else; or without data: none
//   scatter  (dim, dim)   float64, row-major; only the lower triangle (column <= row) is read or written:
//                         it becomes scatter + sum over rows of (x - shift)(x - shift)^T
//   splits   1            rows are rounded to bfloat16, once; bfloat16 rows without a shift lose nothing
//            3            rows are sums of three bfloat16 numbers, which hold the 24 bits of a float32
//
// column_sums: one read of the rows before it, for their mean, and for what must be known of them.
//
//   x      (rows, dim)     float16, bfloat16, float32 or float64; last stride 1, any row stride
//   limit                  what an entry's size may be at most
//   sums   (chunks, dim)   float64, written: x - x[0] summed over each kColumnSumsRows rows
//   told   (3,)            float64, none negative: becomes the least of what is there and the number of the
//                          first row with an entry that is NaN or larger than limit; the largest of what is
//                          there and |x|; and of what is there and |x - x[0]|. In float32 of narrower x; NaN
//                          is left out
#pragma once

#include "../core/tensor_view.h"
#include "../cuda/device.h"

namespace scalpel::cuda {

constexpr int kColumnSumsRows = 64;

void column_sums(const TensorView& x, double limit, const TensorView& sums, const TensorView& told,
                 const CudaQueue& queue);

void gram_lower(const TensorView& x, const TensorView& shift, const TensorView& scatter, int splits,
                const CudaQueue& queue);

}  // namespace scalpel::cuda
