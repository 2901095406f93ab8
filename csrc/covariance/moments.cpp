// The operations of covariance.h: checks, rows that wait for a block, and adding and subtracting states.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "covariance/block.h"
#include "covariance/covariance.h"
#include "covariance/kernel.h"

namespace scalpel {
namespace {

const CovarianceKernels* kernels_of(Target target) {
  switch (target) {
#if defined(SCALPEL_X86_TARGETS)
    case Target::kAvx512Vbmi2:  // these kernels never compress lanes, so VBMI2 does not help
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

// scatter_a = scatter_a + sign * (scatter_b + weight * d d^T), on the lower triangle.
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

void check_waiting(const Moments& state, const Waiting& waiting) {
  if (waiting.filled < 0 || waiting.filled > waiting.capacity) {
    throw std::invalid_argument("waiting.filled is " + std::to_string(waiting.filled) +
                                "; allowed: 0 to the capacity, " + std::to_string(waiting.capacity));
  }
  if (state.scatter == nullptr && (state.count != 0 || waiting.capacity < 0)) {
    throw std::invalid_argument("a state with rows needs its scatter");
  }
}

Rows rows_of(const Waiting& waiting, std::int64_t dim) {
  return {waiting.data, dim, waiting.filled, waiting.dtype};
}

void wait(Waiting& waiting, const Rows& rows, std::int64_t dim, int threads) {
  const std::int64_t bytes = dim * item_size(waiting.dtype);
  char* const to = static_cast<char*>(waiting.data) + waiting.filled * bytes;
  auto copy = [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      std::memcpy(to + r * bytes, rows.from(r, 1).data, static_cast<std::size_t>(bytes));
    }
  };
  parallel_for(rows.count, std::max<std::int64_t>(1, 65536 / bytes), threads_for(rows.count * dim, threads),
               copy);
  waiting.filled += rows.count;
}

// Folds whole blocks into the state and moves the remaining rows to the front.
void fold_blocks(Moments& state, Waiting& waiting, int threads) {
  const Rows rows = rows_of(waiting, state.dim);
  const std::int64_t whole = waiting.filled / kBlockRows * kBlockRows;
  for (std::int64_t r = 0; r < whole; r += kBlockRows) add_block(state, rows.from(r, kBlockRows), threads);
  waiting.filled -= whole;
  const std::int64_t bytes = state.dim * item_size(waiting.dtype);
  if (whole > 0) {
    std::memmove(waiting.data, rows.from(whole, 0).data, static_cast<std::size_t>(waiting.filled * bytes));
  }
}

}  // namespace

const CovarianceKernels& active_covariance_kernels() { return *kernels_of(active_target().target); }

std::int64_t waiting_limit(const Moments& state) {
  return state.count > 0 ? kBlockRows : std::max(kBlockRows, state.dim);
}

std::int64_t update_moments(Moments& state, Waiting& waiting, const TensorView& x, int threads) {
  check_state(state, "state");
  check_waiting(state, waiting);
  if (x.ndim != 2 || x.shape[1] != state.dim) {
    throw std::invalid_argument("x must have 2 dimensions, the last of width " + std::to_string(state.dim) +
                                "; it has " + std::to_string(x.ndim) + " and its last has width " +
                                std::to_string(x.width()));
  }
  if (x.shape[1] > 1 && x.strides[1] != 1) {
    throw std::invalid_argument("x has stride " + std::to_string(x.strides[1]) +
                                " in its last dimension; it must be 1 (make it contiguous)");
  }
  Rows rows{x.data, x.row_stride(), x.shape[0], x.dtype};
  kernels_for(active_covariance_kernels(), x.dtype);  // throws for an unsupported dtype
  if (rows.count == 0) return -1;
  if (waiting.filled > 0 && waiting.dtype != x.dtype) {
    throw std::invalid_argument(std::string("the waiting rows are ") + name_of(waiting.dtype) + " and x is " +
                                name_of(x.dtype) + "; fold the waiting rows first");
  }
  waiting.dtype = x.dtype;
  const std::int64_t limit = waiting_limit(state);
  const bool folds = waiting.filled + rows.count >= limit;
  const std::int64_t room = folds ? kBlockRows : waiting.filled + rows.count;
  if (waiting.capacity < room || (folds && state.scatter == nullptr)) {
    throw std::invalid_argument("waiting has room for " + std::to_string(waiting.capacity) +
                                " rows; it must be " + std::to_string(room) +
                                (folds ? ", and there must be a scatter" : ""));
  }
  const std::int64_t bad = first_bad_row(rows, state.dim, threads);
  if (bad >= 0) return bad;
  if (folds) {
    fold_blocks(state, waiting, threads);
    if (waiting.filled > 0) {
      const std::int64_t head = std::min(kBlockRows - waiting.filled, rows.count);
      wait(waiting, rows.from(0, head), state.dim, threads);
      rows = rows.from(head, rows.count);
      fold_blocks(state, waiting, threads);
    }
    while (rows.count >= kBlockRows) {
      add_block(state, rows.from(0, kBlockRows), threads);
      rows = rows.from(kBlockRows, rows.count);
    }
  }
  wait(waiting, rows, state.dim, threads);
  return -1;
}

std::int64_t bad_row(const TensorView& x, int threads) {
  if (x.ndim != 2 || (x.shape[1] > 1 && x.strides[1] != 1)) {
    throw std::invalid_argument("x must have 2 dimensions and stride 1 in the last");
  }
  return first_bad_row({x.data, x.row_stride(), x.shape[0], x.dtype}, std::max<std::int64_t>(1, x.shape[1]),
                       threads);
}

double center_rows(const TensorView& x, bool centered, const TensorView& mean, const TensorView& out,
                   int threads) {
  const RowKernels& kernels = kernels_for(active_covariance_kernels(), x.dtype);
  const std::int64_t dim = x.width();
  const DType wide = kernels.narrow ? DType::kFloat32 : DType::kFloat64;
  if (x.ndim != 2 || x.shape[0] < 1 || (dim > 1 && x.strides[1] != 1) || mean.ndim != 1 ||
      mean.shape[0] != dim || mean.dtype != DType::kFloat64 || (dim > 1 && mean.strides[0] != 1) ||
      out.ndim != 2 || out.shape[0] != x.shape[0] || out.shape[1] != dim || out.dtype != wide ||
      (dim > 1 && out.strides[1] != 1) || (out.shape[0] > 1 && out.strides[0] != dim)) {
    throw std::invalid_argument(
        std::string("x must be (rows, dim) with stride 1 in the last, mean (dim,) float64, "
                    "out (rows, dim) contiguous ") +
        name_of(wide));
  }
  const Rows rows{x.data, x.row_stride(), x.shape[0], x.dtype};
  find_mean(rows, dim, centered, static_cast<double*>(mean.data), threads);
  const std::vector<double> zeros(static_cast<std::size_t>(dim), 0.0);
  const double* const shift = centered ? static_cast<double*>(mean.data) : zeros.data();
  std::vector<double> squares(static_cast<std::size_t>(rows.count));
  auto some = [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r) {
      squares[r] = kernels.center(rows.from(r, 1).data, dim, shift,
                                  static_cast<char*>(out.data) + r * dim * item_size(wide));
    }
  };
  parallel_for(rows.count, std::max<std::int64_t>(1, 65536 / dim), threads_for(rows.count * dim, threads),
               some);
  double sum = 0;  // summed in the order of the rows, whatever the number of threads
  for (const double each : squares) sum += each;
  return sum;
}

void fold_moments(Moments& state, Waiting& waiting, int threads) {
  check_state(state, "state");
  check_waiting(state, waiting);
  if (waiting.filled == 0) return;
  if (state.scatter == nullptr)
    throw std::invalid_argument("the state has waiting rows, but no scatter to fold them into");
  fold_blocks(state, waiting, threads);
  add_block(state, rows_of(waiting, state.dim), threads);
  waiting.filled = 0;
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
  // Cancellation may leave a variance slightly below zero, which is impossible for a variance.
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
