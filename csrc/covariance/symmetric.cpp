// The covariance in full, from the lower triangle of a scatter.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/parallel.h"
#include "covariance/covariance.h"

namespace scalpel {
namespace {

constexpr std::int64_t kSquare = 32;  // a square of doubles and its mirror image stay in L1

template <class T>
void mirror(const Moments& state, T* out, int threads) {
  const std::int64_t dim = state.dim;
  const double count = static_cast<double>(state.count);
  const std::int64_t squares = (dim + kSquare - 1) / kSquare;
  auto bands = [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t band = first; band < last; ++band) {
      const std::int64_t p = squares - 1 - band;  // the longest first, so that threads end together
      for (std::int64_t q = 0; q <= p; ++q) {
        const std::int64_t bottom = std::min(dim, (p + 1) * kSquare);
        for (std::int64_t i = p * kSquare; i < bottom; ++i) {
          const std::int64_t right = std::min(i + 1, (q + 1) * kSquare);
          for (std::int64_t j = q * kSquare; j < right; ++j) {
            const T value = static_cast<T>(state.scatter[i * dim + j] / count);
            out[i * dim + j] = value;
            out[j * dim + i] = value;
          }
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
