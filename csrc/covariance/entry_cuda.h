// An entry of a row on a GPU: the type that stores it, and its value.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../core/tensor_view.h"
#include "../cuda/device.h"

namespace scalpel::cuda {

template <DType kType>
using Bits = std::conditional_t<kType == DType::kFloat64, double,
                                std::conditional_t<kType == DType::kFloat32, float, std::uint16_t>>;

// The value of an entry: float64 for float64, otherwise float32, which represents all the other dtypes
// exactly.
template <DType kType>
__device__ auto value_of(Bits<kType> bits) {
  if constexpr (kType == DType::kBFloat16)
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
  else if constexpr (kType == DType::kFloat16)
    return device::float_of_half(bits);
  else
    return bits;
}

}  // namespace scalpel::cuda
