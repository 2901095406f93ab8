// The kernels that read the rows of a covariance on a GPU; torch computes the rest of the state, in
// python/scalpel/covariance/on_device.py. The calls return without waiting for the device and allocate
// nothing. The bits depend on nothing but the arguments. Errors: std::invalid_argument (DTypeError for a
// dtype).
//
// gram_lower: adds the Gram matrix of the rows to a scatter in float64.
//
//   x        (rows, dim)  float16, bfloat16 or float32; last stride 1, any row stride; finite
//   shift    (dim,)       float32, subtracted from every row in float32 before anything else; may be absent
//   scatter  (dim, dim)   float64, row-major; only the lower triangle (column <= row) is read or written:
//                         it becomes scatter + sum over rows of (x - shift)(x - shift)^T
//   splits   1            rows are rounded once to bfloat16; bfloat16 rows without a shift lose nothing
//            3            rows become sums of three bfloat16 numbers, which hold the 24 bits of a float32
//
// column_sums: reads the rows once before that, for their mean and for the facts that the caller needs.
//
//   x      (rows, dim)     float16, bfloat16, float32 or float64; last stride 1, any row stride
//   limit                  the largest size that an entry may have
//   sums   (chunks, dim)   float64, overwritten: x - x[0] summed over each kColumnSumsRows rows
//   told   (3,)            float64, not negative, updated in place. told[0] becomes the minimum of itself and
//                          the index of the first row with an entry that is NaN or larger than limit,
//                          told[1] the maximum of itself and |x|, and told[2] that of itself and |x - x[0]|.
//                          Sizes are computed in float32 unless x is float64, and NaN is ignored in them
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
