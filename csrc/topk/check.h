// The argument checks that every target shares: dtypes, shapes and memory. They read only the descriptions
// of the tensors, never the data, so the GPU can use them without waiting for the device.
#pragma once

#include <cstdint>

#include "../core/tensor_view.h"

namespace scalpel {

enum class TopKOutput : std::uint8_t { kMask, kKept, kIndex };

// Throws std::invalid_argument (DTypeError for a dtype) with what was given and what is allowed.
void check_topk(const TensorView& x, std::int64_t k, const TensorView& out, TopKOutput output);

// True when the tensor has no elements.
bool topk_empty(const TensorView& view);

}  // namespace scalpel
