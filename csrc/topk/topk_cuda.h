// TopK on a GPU: the contract of topk.h, for memory of one device. Nothing is waited for and nothing is
// allocated.
//
// Strides before the last may be anything; of what can't be merged into one, at most kMaxRowDims dimensions.
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
