// What every target refuses: checks of dtypes, shapes and memory in front of the kernels. Only descriptions
// are read.
#pragma once

#include <cstdint>

#include "../core/tensor_view.h"

namespace scalpel {

enum class TopKOutput : std::uint8_t { kMask, kKept, kIndex };

// std::invalid_argument (DTypeError for a dtype) that says what was given and what is allowed.
void check_topk(const TensorView& x, std::int64_t k, const TensorView& out, TopKOutput output);

// True when there is no element.
bool topk_empty(const TensorView& view);

}  // namespace scalpel
