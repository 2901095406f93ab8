// Checks, packs rows into panels, and adds tiles of the lower triangle in parallel.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "covariance/covariance.h"
#include "covariance/kernel.h"

namespace scalpel {
namespace {

// Rows packed at a time: two panels of them (2 x 32 KB) stay close to the core.
constexpr std::int64_t kChunk = 256;
// Squares beyond this overflow a float64 sum, which would spoil the state without a NaN in sight.
constexpr double kLargest = 1e150;

const CovarianceKernels* kernels_of(Target target) {
  switch (target) {
#if defined(SCALPEL_X86_TARGETS)
    case Target::kAvx512Vbmi2:  // compressing lanes is of no use here
    case Target::kAvx512:
      return &covariance_avx512();
    case Target::kAvx2:
      return &covariance_avx2();
#endif
    case Target::kPortable:
      return &covariance_portable();
    default:
      return nullptr;
  }
}

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

inline double to_double(double v) { return v; }
inline double to_double(float v) { return v; }
inline double to_double(BFloat16 v) { return std::bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16); }
inline double to_double(Float16 v) {
  const int exponent = (v.bits >> 10) & 31;
  const int fraction = v.bits & 1023;
  double magnitude;
  if (exponent == 31) {
    magnitude =
        fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = fraction * 0x1p-24;
  } else {
    magnitude = std::bit_cast<double>((static_cast<std::uint64_t>(exponent + 1008) << 52) |
                                      (static_cast<std::uint64_t>(fraction) << 42));
  }
  return (v.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

template <class T>
class Batch {
 public:
  Batch(Moments& state, const TensorView& x, int threads)
      : state_(state),
        x_(static_cast<const T*>(x.data)),
        stride_(x.row_stride()),
        rows_(x.shape[0]),
        dim_(state.dim),
        panels_((dim_ + kPanel - 1) / kPanel),
        threads_(threads) {}

  std::int64_t first_bad_row() const {
    std::atomic<std::int64_t> first{rows_};
    auto scan = [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t r = begin; r < end && r < first.load(std::memory_order_relaxed); ++r) {
        const T* row = x_ + r * stride_;
        int bad = 0;
        for (std::int64_t c = 0; c < dim_; ++c) bad |= !(std::fabs(to_double(row[c])) <= kLargest);
        if (bad != 0) {
          std::int64_t seen = first.load();
          while (r < seen && !first.compare_exchange_weak(seen, r)) {
          }
          return;
        }
      }
    };
    parallel_for(rows_, std::max<std::int64_t>(1, 65536 / dim_), threads_for(rows_ * dim_, threads_), scan);
    return first.load() == rows_ ? -1 : first.load();
  }

  void add() {
    const std::int64_t before = state_.count;
    const std::int64_t after = before + rows_;
    mean_.assign(static_cast<std::size_t>(dim_), 0.0);
    joint_.assign(static_cast<std::size_t>(dim_), 0.0);
    const std::int64_t chunk = std::min(kChunk, rows_ + 1);
    packed_.reset(static_cast<double*>(
        ::operator new[](static_cast<std::size_t>(chunk * panels_ * kPanel) * sizeof(double), kAlign)));

    find_mean();
    const double weight = std::sqrt(static_cast<double>(before) / static_cast<double>(after)) *
                          std::sqrt(static_cast<double>(rows_));
    for (std::int64_t c = 0; c < dim_; ++c) joint_[c] = weight * (mean_[c] - state_.mean[c]);

    // Chan's d d^T n_a n_b / n is one more centred row, sqrt(n_a n_b / n) d, after those of the batch.
    const bool has_joint = state_.centered && before > 0;
    const std::int64_t all = rows_ + (has_joint ? 1 : 0);
    for (std::int64_t begin = 0; begin < all; begin += chunk) {
      const std::int64_t end = std::min(all, begin + chunk);
      pack(begin, end);
      add_tiles(end - begin);
    }
    const double share = static_cast<double>(rows_) / static_cast<double>(after);
    for (std::int64_t c = 0; c < dim_; ++c) {
      state_.mean[c] = before == 0 ? mean_[c] : state_.mean[c] + (mean_[c] - state_.mean[c]) * share;
    }
    state_.count = after;
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(double* p) const { ::operator delete[](p, kAlign); }
  };

  void find_mean() {
    auto columns = [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t c = begin; c < end; ++c)
        joint_[c] = state_.count > 0 ? state_.mean[c] : to_double(x_[c]);
      for (std::int64_t r = 0; r < rows_; ++r) {
        const T* row = x_ + r * stride_;
        for (std::int64_t c = begin; c < end; ++c) mean_[c] += to_double(row[c]) - joint_[c];
      }
      for (std::int64_t c = begin; c < end; ++c) mean_[c] = joint_[c] + mean_[c] / static_cast<double>(rows_);
    };
    parallel_for(dim_, 256, threads_for(rows_ * dim_, threads_), columns);
  }

  void pack(std::int64_t begin, std::int64_t end) {
    const std::int64_t height = end - begin;
    auto panels = [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t p = first; p < last; ++p) {
        const std::int64_t left = p * kPanel;
        const std::int64_t used = std::min(kPanel, dim_ - left);
        double shift[kPanel] = {};
        if (state_.centered) std::copy_n(mean_.data() + left, used, shift);
        double* to = packed_.get() + p * kPanel * height;
        for (std::int64_t r = begin; r < end; ++r, to += kPanel) {
          if (r == rows_) {
            std::copy_n(joint_.data() + left, used, to);
          } else {
            const T* row = x_ + r * stride_ + left;
            for (std::int64_t c = 0; c < used; ++c) to[c] = to_double(row[c]) - shift[c];
          }
          std::fill(to + used, to + kPanel, 0.0);
        }
      }
    };
    parallel_for(panels_, 8, threads_for(height * dim_, threads_), panels);
  }

  void add_tiles(std::int64_t height) {
    const CovarianceKernels& kernels = *kernels_of(active_target().target);
    auto bands = [&](std::int64_t first, std::int64_t last, int) {
      alignas(64) double tile[kPanel * kPanel];
      for (std::int64_t band = first; band < last; ++band) {
        const std::int64_t p = panels_ - 1 - band;  // the longest bands first, so that threads end together
        const std::int64_t bottom = std::min(dim_, (p + 1) * kPanel);
        for (std::int64_t q = 0; q <= p; ++q) {
          const double* a = packed_.get() + p * kPanel * height;
          const double* b = packed_.get() + q * kPanel * height;
          kernels.tile(a, b, height, tile);
          for (std::int64_t i = p * kPanel; i < bottom; ++i) {
            const std::int64_t right = std::min(i + 1, (q + 1) * kPanel);
            double* to = state_.scatter + i * dim_;
            const double* from = tile + (i - p * kPanel) * kPanel - q * kPanel;
            for (std::int64_t j = q * kPanel; j < right; ++j) to[j] += from[j];
          }
        }
      }
    };
    parallel_for(panels_, 1, threads_for(height * dim_ * dim_ / 8, threads_), bands);
  }

  Moments& state_;
  const T* const x_;
  const std::int64_t stride_;
  const std::int64_t rows_;
  const std::int64_t dim_;
  const std::int64_t panels_;
  const int threads_;
  std::vector<double> mean_;   // of the batch
  std::vector<double> joint_;  // first the shift of the sums, then the row that joins batch and state
  std::unique_ptr<double[], Free> packed_;
};

void check_state(const Moments& m, const char* name) {
  if (m.dim < 1) {
    throw std::invalid_argument(std::string(name) + " has dim " + std::to_string(m.dim) +
                                "; it must be at least 1");
  }
  if (m.count < 0) {
    throw std::invalid_argument(std::string(name) + " has count " + std::to_string(m.count) +
                                "; it can't be negative");
  }
}

void check_pair(const Moments& a, const Moments& b) {
  check_state(a, "state");
  check_state(b, "other");
  if (a.dim != b.dim) {
    throw std::invalid_argument("other has dim " + std::to_string(b.dim) + ", this state has dim " +
                                std::to_string(a.dim) + "; they must be equal");
  }
  if (a.centered != b.centered) {
    throw std::invalid_argument(std::string("other is ") + (b.centered ? "centered" : "not centered") +
                                ", this state is " + (a.centered ? "centered" : "not centered") +
                                "; they must be equal");
  }
}

// scatter_a = scatter_a + sign * (scatter_b + weight * d d^T) over the lower triangle.
void combine(Moments& a, const Moments& b, double sign, double weight, const std::vector<double>& d,
             int threads) {
  auto rows = [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      double* to = a.scatter + i * a.dim;
      const double* from = b.scatter + i * a.dim;
      const double scaled = a.centered ? weight * d[i] : 0.0;
      for (std::int64_t j = 0; j <= i; ++j) to[j] += sign * (from[j] + scaled * d[j]);
    }
  };
  parallel_for(a.dim, 64, threads_for(a.dim * a.dim / 2, threads), rows);
}

}  // namespace

std::int64_t update_moments(Moments& state, const TensorView& x, int threads) {
  check_state(state, "state");
  if (x.ndim != 2 || x.shape[1] != state.dim) {
    throw std::invalid_argument("x must have 2 dimensions, the last of width " + std::to_string(state.dim) +
                                "; it has " + std::to_string(x.ndim) + " and its last has width " +
                                std::to_string(x.width()));
  }
  if (x.shape[1] > 1 && x.strides[1] != 1) {
    throw std::invalid_argument("x has stride " + std::to_string(x.strides[1]) +
                                " in its last dimension; it must be 1 (make it contiguous)");
  }
  if (x.shape[0] == 0) return -1;
  auto update = [&]<class T>(T) {
    Batch<T> batch(state, x, threads);
    const std::int64_t bad = batch.first_bad_row();
    if (bad < 0) batch.add();
    return bad;
  };
  switch (x.dtype) {
    case DType::kFloat16:
      return update(Float16{});
    case DType::kBFloat16:
      return update(BFloat16{});
    case DType::kFloat32:
      return update(float{});
    case DType::kFloat64:
      return update(double{});
    default:
      throw DTypeError(std::string("x is ") + name_of(x.dtype) +
                       "; allowed: float16, bfloat16, float32, float64");
  }
}

void merge_moments(Moments& state, const Moments& other, int threads) {
  check_pair(state, other);
  if (other.count == 0) return;
  const double na = static_cast<double>(state.count);
  const double nb = static_cast<double>(other.count);
  std::vector<double> d(static_cast<std::size_t>(state.dim));
  for (std::int64_t c = 0; c < state.dim; ++c) d[c] = other.mean[c] - state.mean[c];
  combine(state, other, 1.0, na / (na + nb) * nb, d, threads);
  for (std::int64_t c = 0; c < state.dim; ++c) {
    state.mean[c] = state.count == 0 ? other.mean[c] : state.mean[c] + d[c] * (nb / (na + nb));
  }
  state.count += other.count;
}

void subtract_moments(Moments& state, const Moments& other, int threads) {
  check_pair(state, other);
  if (other.count > state.count) {
    throw std::invalid_argument("other holds " + std::to_string(other.count) + " rows, this state only " +
                                std::to_string(state.count) + "; only rows that were added can be taken out");
  }
  if (other.count == 0) return;
  const std::int64_t dim = state.dim;
  const std::int64_t left = state.count - other.count;
  if (left == 0) {
    std::fill_n(state.mean, dim, 0.0);
    std::fill_n(state.scatter, dim * dim, 0.0);
    state.count = 0;
    return;
  }
  const double na = static_cast<double>(left);
  const double nb = static_cast<double>(other.count);
  std::vector<double> d(static_cast<std::size_t>(dim));
  for (std::int64_t c = 0; c < dim; ++c) {
    const double rest = state.mean[c] - (other.mean[c] - state.mean[c]) * (nb / na);
    d[c] = other.mean[c] - rest;
    state.mean[c] = rest;
  }
  combine(state, other, -1.0, na / (na + nb) * nb, d, threads);
  // Cancellation may leave a variance a rounding error below zero, where none can be.
  for (std::int64_t c = 0; c < dim; ++c)
    state.scatter[c * dim + c] = std::max(0.0, state.scatter[c * dim + c]);
  state.count = left;
}

const char* covariance_compiled_for(Target target) {
  const CovarianceKernels* kernels = kernels_of(target);
  return kernels == nullptr ? nullptr : kernels->compiled_for;
}

std::uint64_t covariance_calls(Target target) {
  const CovarianceKernels* kernels = kernels_of(target);
  return kernels == nullptr ? 0 : __atomic_load_n(kernels->calls, __ATOMIC_RELAXED);
}

}  // namespace scalpel
