// TopK on a GPU: the contract of topk.h, for memory of one device. The calls return without waiting for the
// device, and they allocate nothing.
//
// Strides other than the last may be anything. After dimensions that form one uniform stride are merged, at
// most kMaxRowDims dimensions may remain.
#pragma once

#include "../core/tensor_view.h"
#include "../cuda/device.h"
#include "topk.h"

namespace scalpel::cuda {

void topk_mask(const TensorView& x, std::int64_t k, RankBy by, const TensorView& mask,
               const CudaQueue& queue);
void keep_topk(const TensorView& x, std::int64_t k, RankBy by, const TensorView& kept,
               const CudaQueue& queue);
void topk_indices(const TensorView& x, std::int64_t k, RankBy by, const TensorView& index,
                  const CudaQueue& queue);

}  // namespace scalpel::cuda
