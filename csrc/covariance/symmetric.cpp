// Expands the lower triangle of a scatter to the full covariance, square by square, so that the transposed
// writes stay in cache.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/parallel.h"
#include "covariance/covariance.h"

namespace scalpel {
namespace {

constexpr std::int64_t kSide = 32;  // the side of a square that fits L1 together with its mirror image

template <class T>
void mirror(const Moments& state, T* out, int threads) {
  const std::int64_t dim = state.dim;
  const double count = static_cast<double>(state.count);
  const std::int64_t squares = (dim + kSide - 1) / kSide;
  auto bands = [&](std::int64_t first, std::int64_t last, int) {
    T image[kSide * kSide];
    for (std::int64_t band = first; band < last; ++band) {
      // The longest bands come first, so that all threads finish together.
      const std::int64_t p = squares - 1 - band;
      const std::int64_t top = p * kSide;
      const std::int64_t height = std::min(kSide, dim - top);
      for (std::int64_t left = 0; left < top; left += kSide) {
        for (std::int64_t i = 0; i < height; ++i) {
          const double* const from = state.scatter + (top + i) * dim + left;
          T* const to = out + (top + i) * dim + left;
          for (std::int64_t j = 0; j < kSide; ++j) to[j] = static_cast<T>(from[j] / count);
          for (std::int64_t j = 0; j < kSide; ++j) image[j * kSide + i] = to[j];
        }
        for (std::int64_t j = 0; j < kSide; ++j) {
          std::copy_n(image + j * kSide, height, out + (left + j) * dim + top);
        }
      }
      for (std::int64_t i = top; i < top + height; ++i) {
        for (std::int64_t j = top; j <= i; ++j) {
          out[i * dim + j] = out[j * dim + i] = static_cast<T>(state.scatter[i * dim + j] / count);
        }
      }
    }
  };
  parallel_for(squares, 1, threads_for(dim * dim, threads), bands);
}

}  // namespace

void symmetric_moments(const Moments& state, const TensorView& out, int threads) {
  if (state.scatter == nullptr || state.count < 1) throw std::invalid_argument("state has no rows");
  if (out.ndim != 2 || out.shape[0] != state.dim || out.shape[1] != state.dim ||
      (state.dim > 1 && (out.strides[0] != state.dim || out.strides[1] != 1))) {
    throw std::invalid_argument("out must be contiguous, of shape (dim, dim) with dim " +
                                std::to_string(state.dim));
  }
  if (out.dtype == DType::kFloat32) {
    mirror(state, static_cast<float*>(out.data), threads);
  } else if (out.dtype == DType::kFloat64) {
    mirror(state, static_cast<double*>(out.data), threads);
  } else {
    throw DTypeError(std::string("out is ") + name_of(out.dtype) + "; allowed: float32, float64");
  }
}

}  // namespace scalpel
