// Folds a block of rows into a state: its mean, its packed panels, and the tiles of the lower triangle, in
// parallel. Packing copies every row once, so that the tiles read contiguous memory.
#include "covariance/block.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "core/memory.h"
#include "core/parallel.h"

namespace scalpel {
namespace {

// The number of panels of the triangle's rows that share one panel of its columns; 1024 rows of them fill
// 512 KB. With too few panels for the threads, they are processed one by one.
constexpr std::int64_t kBand = 4;
constexpr std::int64_t kPanelsPerThread = 8;
// Squares of larger entries overflow a float64 sum, which would spoil the state although no entry is NaN.
constexpr double kLargest = 1e150;
// The range of deviations of which float32 holds the sum of 1024 squares with room at both ends.
constexpr double kSmallest = 1e-12;
constexpr double kLargestFloat = 1e15;

void multiply(const CovarianceKernels& kernels, const float* a, const float* b, std::int64_t rows,
              double* tile) {
  kernels.tile_float32(a, b, rows, tile);
}
void multiply(const CovarianceKernels& kernels, const double* a, const double* b, std::int64_t rows,
              double* tile) {
  kernels.tile_float64(a, b, rows, tile);
}

// S is the type in which products are computed.
template <class S>
class Block {
 public:
  Block(Moments& state, const Rows& rows, std::vector<double> mean, int threads)
      : state_(state),
        rows_(rows),
        kernels_(active_covariance_kernels()),
        of_rows_(kernels_for(kernels_, rows.dtype)),
        pack_(sizeof(S) == 8 ? of_rows_.pack_wide : of_rows_.pack),
        dim_(state.dim),
        panels_((dim_ + kWidth - 1) / kWidth),
        threads_(threads),
        mean_(std::move(mean)),
        shift_(static_cast<std::size_t>(dim_), 0.0),
        joint_(static_cast<std::size_t>(panels_ * kWidth), 0.0) {
    const std::size_t bytes = static_cast<std::size_t>(rows.count * panels_ * kPanelBytes);
    packed_.reset(static_cast<S*>(::operator new[](bytes, kAlign)));
    prefer_huge_pages(packed_.get(), static_cast<std::int64_t>(bytes));
  }

  void add() {
    const std::int64_t before = state_.count;
    const std::int64_t after = before + rows_.count;
    if (state_.centered) {
      shift_ = mean_;
      // The term d d^T n_a n_b / n of Chan's rule is one more outer product, that of the row sqrt(n_a n_b /
      // n) d.
      const double weight = std::sqrt(static_cast<double>(before) / static_cast<double>(after)) *
                            std::sqrt(static_cast<double>(rows_.count));
      for (std::int64_t c = 0; c < dim_; ++c)
        joint_[c] = before == 0 ? 0.0 : weight * (mean_[c] - state_.mean[c]);
    }
    pack();
    add_tiles();
    const double share = static_cast<double>(rows_.count) / static_cast<double>(after);
    for (std::int64_t c = 0; c < dim_; ++c) {
      state_.mean[c] = before == 0 ? mean_[c] : state_.mean[c] + (mean_[c] - state_.mean[c]) * share;
    }
    state_.count = after;
  }

 private:
  static constexpr std::int64_t kWidth = kPanelBytes / static_cast<std::int64_t>(sizeof(S));
  // The number of rows that are summed before the sum is added in float64. With 128 the error of float32
  // products is half that of torch's X^T X (with 256 it is equal, with 64 a quarter, for a twelfth more
  // time). For float64, panels of 256 rows are fastest.
  static constexpr std::int64_t kChunk = sizeof(S) == 4 ? 128 : 256;
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(S* p) const { ::operator delete[](p, kAlign); }
  };

  const void* at(std::int64_t row, std::int64_t column) const {
    return static_cast<const char*>(rows_.data) + (row * rows_.stride + column) * item_size(rows_.dtype);
  }

  S* panel(std::int64_t first_row, std::int64_t height, std::int64_t p) {
    return packed_.get() + (first_row * panels_ + p * height) * kWidth;
  }

  void pack() {
    for (std::int64_t begin = 0; begin < rows_.count; begin += kChunk) {
      const std::int64_t height = std::min(kChunk, rows_.count - begin);
      auto panels = [&](std::int64_t first, std::int64_t last, int) {
        for (std::int64_t p = first; p < last; ++p) {
          const std::int64_t left = p * kWidth;
          pack_(at(begin, left), rows_.stride, height, std::min(kWidth, dim_ - left), shift_.data() + left,
                panel(begin, height, p));
        }
      };
      parallel_for(panels_, 8, threads_for(height * dim_, threads_), panels);
    }
  }

  void add_tiles() {
    const int threads = threads_for(rows_.count * dim_ * dim_ / 8, threads_);
    const std::int64_t together = panels_ >= kPanelsPerThread * threads ? kBand : 1;
    const std::int64_t bands = (panels_ + together - 1) / together;
    auto some = [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t band = first; band < last; ++band) {
        // The longest bands come first, so that all threads finish together.
        const std::int64_t top = (bands - 1 - band) * together;
        const std::int64_t bottom = std::min(panels_, top + together);
        for (std::int64_t q = 0; q < bottom; ++q) {
          for (std::int64_t p = std::max(top, q); p < bottom; ++p) add_tile(p, q);
        }
      }
    };
    parallel_for(bands, 1, threads, some);
  }

  void add_tile(std::int64_t p, std::int64_t q) {
    alignas(64) double tile[kWidth * kWidth] = {};
    for (std::int64_t begin = 0; begin < rows_.count; begin += kChunk) {
      const std::int64_t height = std::min(kChunk, rows_.count - begin);
      multiply(kernels_, panel(begin, height, p), panel(begin, height, q), height, tile);
    }
    const std::int64_t row = p * kWidth;
    const std::int64_t column = q * kWidth;
    kernels_.join(tile, kWidth, std::min(kWidth, dim_ - row), std::min(kWidth, dim_ - column), row - column,
                  joint_.data() + row, joint_.data() + column, state_.scatter + row * dim_ + column, dim_);
  }

  Moments& state_;
  const Rows rows_;
  const CovarianceKernels& kernels_;
  const RowKernels& of_rows_;
  void (*const pack_)(const void*, std::int64_t, std::int64_t, std::int64_t, const double*, void*);
  const std::int64_t dim_;
  const std::int64_t panels_;
  const int threads_;
  std::vector<double> mean_;   // the block's mean
  std::vector<double> shift_;  // what is subtracted from each row
  std::vector<double> joint_;  // the row whose outer product accounts for the difference of the means
  std::unique_ptr<S[], Free> packed_;
};

}  // namespace

const RowKernels& kernels_for(const CovarianceKernels& kernels, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return kernels.float16;
    case DType::kBFloat16:
      return kernels.bfloat16;
    case DType::kFloat32:
      return kernels.float32;
    case DType::kFloat64:
      return kernels.float64;
    default:
      throw DTypeError(std::string("x is ") + name_of(dtype) +
                       "; allowed: float16, bfloat16, float32, float64");
  }
}

std::int64_t first_bad_row(const Rows& rows, std::int64_t dim, int threads) {
  const RowKernels& kernels = kernels_for(active_covariance_kernels(), rows.dtype);
  std::atomic<std::int64_t> first{rows.count};
  auto scan = [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end && r < first.load(std::memory_order_relaxed); ++r) {
      if (kernels.has_bad(rows.from(r, 1).data, dim, kLargest)) {
        std::int64_t seen = first.load();
        while (r < seen && !first.compare_exchange_weak(seen, r)) {
        }
        return;
      }
    }
  };
  parallel_for(rows.count, std::max<std::int64_t>(1, 65536 / dim), threads_for(rows.count * dim, threads),
               scan);
  return first.load() == rows.count ? -1 : first.load();
}

double find_mean(const Rows& rows, std::int64_t dim, bool centered, double* mean, int threads) {
  const RowKernels& kernels = kernels_for(active_covariance_kernels(), rows.dtype);
  const auto columns = static_cast<std::size_t>(dim);
  const std::vector<double> zeros(columns, 0.0);
  std::vector<double> start(columns, 0.0);
  std::vector<double> peaks(columns, 0.0);
  kernels.add_to_sums(rows.data, rows.stride, 1, dim, zeros.data(), start.data(), peaks.data());
  std::fill(peaks.begin(), peaks.end(), 0.0);
  std::fill_n(mean, dim, 0.0);
  auto some = [&](std::int64_t begin, std::int64_t end, int) {
    const auto* from = static_cast<const char*>(rows.data) + begin * item_size(rows.dtype);
    kernels.add_to_sums(from, rows.stride, rows.count, end - begin, start.data() + begin, mean + begin,
                        peaks.data() + begin);
  };
  parallel_for(dim, 256, threads_for(rows.count * dim, threads), some);
  double most = 0;
  for (std::int64_t c = 0; c < dim; ++c) {
    mean[c] = start[c] + mean[c] / static_cast<double>(rows.count);
    // No entry is farther from the mean than twice the largest distance from the first row.
    most = std::max(most, centered ? 2 * peaks[c] : peaks[c] + std::fabs(start[c]));
  }
  return most;
}

void add_block(Moments& state, const Rows& rows, int threads) {
  if (rows.count == 0) return;
  std::vector<double> mean(static_cast<std::size_t>(state.dim));
  const double most = find_mean(rows, state.dim, state.centered, mean.data(), threads);
  const bool fits = most == 0 || (kSmallest < most && most < kLargestFloat);
  if (kernels_for(active_covariance_kernels(), rows.dtype).narrow && fits) {
    Block<float>(state, rows, std::move(mean), threads).add();
  } else {
    Block<double>(state, rows, std::move(mean), threads).add();
  }
}

}  // namespace scalpel
