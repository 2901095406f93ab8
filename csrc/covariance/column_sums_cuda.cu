// What an update must know of its rows before it multiplies them: sums of columns, the first row that is not
// finite, and the largest sizes. All of it takes one read of the rows.
//
// A block handles a range of columns and kChunk rows. Sums are float64 sums of the differences from the
// first row, so that a column that never varies sums to exactly 0; the caller adds up the sums of the
// chunks. The maxima and the first row do not depend on the order of evaluation, so they use atomics, on the
// bit patterns of numbers that are not negative.
//
// Cost: one read of the rows, and a write of 1/64 as many float64 numbers.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "covariance_cuda.h"
#include "entry_cuda.h"

namespace scalpel::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = kColumnSumsRows;

struct Job {
  const void* x;
  double* sums;
  double* told;
  std::int64_t rows, stride;
  int dim;
  double limit;
};

__device__ void at_most(double* at, double value) {
  auto* bits = reinterpret_cast<unsigned long long*>(at);
  const auto mine = static_cast<unsigned long long>(__double_as_longlong(value));
  if (mine < *bits) atomicMin(bits, mine);
}
__device__ void at_least(double* at, double value) {
  auto* bits = reinterpret_cast<unsigned long long*>(at);
  const auto mine = static_cast<unsigned long long>(__double_as_longlong(value));
  if (mine > *bits) atomicMax(bits, mine);
}

template <class T>
__device__ T largest_of_warp(T value) {
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xFFFFFFFFu, value, step);
    value = other > value ? other : value;
  }
  return value;
}

template <DType kType, int kColumns>
__global__ void __launch_bounds__(kThreads) column_sums(Job job) {
  using Value = decltype(value_of<kType>({}));
  struct alignas(sizeof(Bits<kType>) * kColumns) Vec {
    Bits<kType> entry[kColumns];
  };
  const int column = static_cast<int>(blockIdx.y * kThreads + threadIdx.x) * kColumns;
  const auto* x = static_cast<const Bits<kType>*>(job.x) + column;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kChunk;
  const std::int64_t end = begin + kChunk < job.rows ? begin + kChunk : job.rows;
  const auto limit = static_cast<Value>(job.limit);
  Value size = 0, farthest = 0;
  std::int64_t bad = job.rows;
  if (column < job.dim) {
    const Vec first = *reinterpret_cast<const Vec*>(x);
    double sums[kColumns] = {};
#pragma unroll 4
    for (std::int64_t row = begin; row < end; ++row) {
      const Vec here = *reinterpret_cast<const Vec*>(x + row * job.stride);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const Value value = value_of<kType>(here.entry[c]), from = value_of<kType>(first.entry[c]);
        sums[c] += static_cast<double>(value) - static_cast<double>(from);
        const Value apart = value > from ? value - from : from - value;
        const Value magnitude = value < 0 ? -value : value;
        if (apart > farthest) farthest = apart;  // false for NaN, which is therefore ignored
        if (magnitude > size) size = magnitude;
        if (!(magnitude <= limit) && row < bad) bad = row;
      }
    }
    double* to = job.sums + static_cast<std::int64_t>(blockIdx.x) * job.dim + column;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) to[c] = sums[c];
  }
  size = largest_of_warp(size);
  farthest = largest_of_warp(farthest);
  if (threadIdx.x % 32 == 0) {
    at_least(job.told + 1, static_cast<double>(size));
    at_least(job.told + 2, static_cast<double>(farthest));
  }
  if (bad < job.rows) at_most(job.told, static_cast<double>(bad));
}

template <DType kType, int kColumns>
void start(const Job& job, const CudaQueue& queue) {
  const std::int64_t chunks = (job.rows + kChunk - 1) / kChunk;
  const std::int64_t across = (job.dim + kThreads * kColumns - 1) / (kThreads * kColumns);
  device::launch(column_sums<kType, kColumns>,
                 dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(across)), dim3(kThreads), 0, queue,
                 job);
}

template <DType kType>
void run(const Job& job, const CudaQueue& queue) {
  constexpr int kColumns = 16 / sizeof(Bits<kType>);
  const bool whole = job.dim % kColumns == 0 && reinterpret_cast<std::uintptr_t>(job.x) % 16 == 0 &&
                     job.stride % kColumns == 0;
  return whole ? start<kType, kColumns>(job, queue) : start<kType, 1>(job, queue);
}

void check(const TensorView& x, const TensorView& sums, const TensorView& told) {
  const std::int64_t dim = x.width();
  if (x.ndim != 2 || dim < 1 || dim >= std::int64_t{1} << 22 || (dim > 1 && x.strides[1] != 1))
    throw std::invalid_argument("x must be (rows, dim) with stride 1 in the last and dim below 2^22");
  if (x.shape[0] / kChunk >= std::int64_t{1} << 31)
    throw std::invalid_argument("x has too many rows for one call");
  if (x.dtype != DType::kFloat16 && x.dtype != DType::kBFloat16 && x.dtype != DType::kFloat32 &&
      x.dtype != DType::kFloat64)
    throw DTypeError(std::string("x is ") + name_of(x.dtype) +
                     "; allowed: float16, bfloat16, float32, float64");
  const std::int64_t chunks = (x.shape[0] + kChunk - 1) / kChunk;
  if (sums.ndim != 2 || sums.shape[0] != chunks || sums.shape[1] != dim || sums.dtype != DType::kFloat64 ||
      (dim > 1 && sums.strides[1] != 1) || (chunks > 1 && sums.strides[0] != dim))
    throw std::invalid_argument("sums must be contiguous float64 of shape (chunks of " +
                                std::to_string(kChunk) + " rows, dim)");
  if (told.ndim != 1 || told.shape[0] != 3 || told.dtype != DType::kFloat64 || told.strides[0] != 1)
    throw std::invalid_argument("told must be contiguous float64 of shape (3,)");
}

}  // namespace

void column_sums(const TensorView& x, double limit, const TensorView& sums, const TensorView& told,
                 const CudaQueue& queue) {
  check(x, sums, told);
  if (x.shape[0] == 0) return;
  const device::OnDevice on(queue);
  const Job job{x.data,
                static_cast<double*>(sums.data),
                static_cast<double*>(told.data),
                x.shape[0],
                x.strides[0],
                static_cast<int>(x.shape[1]),
                limit};
  switch (x.dtype) {
    case DType::kFloat16:
      return run<DType::kFloat16>(job, queue);
    case DType::kBFloat16:
      return run<DType::kBFloat16>(job, queue);
    case DType::kFloat32:
      return run<DType::kFloat32>(job, queue);
    default:
      return run<DType::kFloat64>(job, queue);
  }
}

}  // namespace scalpel::cuda
