// The Gram matrix of rows on a GPU, added to a scatter in float64. The rest of a state is torch's, in
// python/scalpel/covariance/on_device.py. Nothing is waited for and nothing is allocated.
//
//   x        (rows, dim)  float16, bfloat16 or float32; last stride 1, any row stride; finite
//   shift    (dim,)       float32, taken off every row in float32 before all else; or without data: none
//   scatter  (dim, dim)   float64, row-major; only the lower triangle (column <= row) is read or written:
//                         it becomes scatter + sum over rows of (x - shift)(x - shift)^T
//   splits   1            rows are rounded to bfloat16, once; bfloat16 rows without a shift lose nothing
//            3            rows are sums of three bfloat16 numbers, which hold the 24 bits of a float32
//
// Errors: std::invalid_argument (DTypeError for a dtype). The bits depend on nothing but the arguments.
#pragma once

#include "../core/tensor_view.h"
#include "../cuda/device.h"

namespace scalpel::cuda {

void gram_lower(const TensorView& x, const TensorView& shift, const TensorView& scatter, int splits,
                const CudaQueue& queue);

}  // namespace scalpel::cuda
