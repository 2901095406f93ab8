// The lower triangle of a Gram matrix on tensor cores. Each block owns a tile, and all rows pass by it in
// slabs.
//
// Tensor cores multiply bfloat16. Three bfloat16 numbers hold all 24 bits of a float32: v = hi + mid + lo.
// Of the nine products of two such sums the six largest are computed; each of the others is below 2^-24 of
// |v w|, like the rounding error of float32. (Henry, Tang & Heinecke 2019, "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations".) bfloat16 has the exponents of
// float32, so no part leaves the range.
//
// A tensor core truncates its sums instead of rounding them. Truncation errors all have the same sign, and
// over n additions of positive products, as in a variance, they grow like n (Fasi, Higham, Mikaitis &
// Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"). Therefore a tensor core only sums the products
// of 16 rows (32 for single bfloat16), the small ones first. These sums are added with rounding in float32
// (Ootomo & Yokota 2022, "Recovering single precision accuracy from tensor cores"), in two steps, and in
// float64 every kFlush rows.
//
// Shared memory holds four rows of a column as one word of 64 bits, which is what a thread needs of a 16-row
// step for either operand. Which four of the 16 rows a word holds is the same for both operands, so it does
// not affect the sum. The next slab is read into registers while the current one is multiplied. A diagonal
// tile has only one operand, and its warps skip what is above the diagonal.
//
// Cost: n dim^2 / 2 products, times 6 for three parts. Every tile reads its rows once, so each row is read
// dim / 128 times in total, mostly from L2. Small dims use tiles of 64, so that there are enough blocks.
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "covariance_cuda.h"
#include "entry_cuda.h"

namespace scalpel::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSlab = 32;  // rows held in shared memory at a time
constexpr int kQuads = kSlab / 4;
// The number of rows after which the sums in registers are added to those in shared memory (kSettle), and
// those to the scatter (kFlush). Adding n numbers of one sign one by one has an error of about eps sqrt(n /
// 12): 128 sums of 16 rows give twice the error of torch's float32 product, two steps of 16 half of it.
// Judged by the bytes moved, a step costs a twentieth of the time of the products, and adding to the
// scatter, in float64 from L2, about as much. Single bfloat16 sums 32 rows at once and takes a sixth of the
// time, so both intervals are longer.
template <int kSplits>
constexpr int kSettle = kSplits == 1 ? 1024 : 256;
template <int kSplits>
constexpr int kFlush = kSplits == 1 ? 8192 : 4096;

struct Job {
  const void* x;
  const float* shift;
  double* scatter;
  std::int64_t rows, stride;
  int dim;
  bool paired;  // two neighbouring entries of x can be read at once
  bool wide;    // two neighbouring entries of scatter can be read and written at once
};

template <DType kType>
using Pair = std::conditional_t<kType == DType::kFloat32, float2, unsigned>;

template <DType kType>
__device__ Pair<kType> pair_of(Bits<kType> low, Bits<kType> high) {
  if constexpr (kType == DType::kFloat32) return make_float2(low, high);
  if constexpr (kType != DType::kFloat32) return low | static_cast<unsigned>(high) << 16;
}

template <DType kType>
__device__ float2 floats_of(Pair<kType> pair) {
  if constexpr (kType == DType::kFloat32) return pair;
  if constexpr (kType == DType::kBFloat16)
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
  if constexpr (kType == DType::kFloat16)
    return make_float2(device::float_of_half(static_cast<std::uint16_t>(pair)),
                       device::float_of_half(static_cast<std::uint16_t>(pair >> 16)));
}

// A thread's share of a slab on its way from device memory to shared memory: two columns of some groups of
// four rows.
template <DType kType, int kSplits, int kTile>
struct Carried {
  // In words of 64 bits. Lanes that read together use different banks.
  static constexpr int kPitch = kTile + 4;
  static constexpr int kPart = kQuads * kPitch;
  static constexpr int kPairs = kTile / 2;
  static constexpr int kItems = kQuads * kPairs / kThreads;

  int column, slot;  // the column in x and its place in the tile
  int quad;
  float2 shift;
  Pair<kType> held[kItems][4];

  __device__ void begin(const Job& job, int first_column) {
    slot = static_cast<int>(threadIdx.x) % kPairs * 2;
    quad = static_cast<int>(threadIdx.x) / kPairs;
    column = first_column + slot;
    shift = make_float2(0.0f, 0.0f);
    if (job.shift != nullptr && column < job.dim) shift.x = job.shift[column];
    if (job.shift != nullptr && column + 1 < job.dim) shift.y = job.shift[column + 1];
  }
  __device__ int row_of(int item, int r) const { return (quad + item * (kThreads / kPairs)) * 4 + r; }

  __device__ void read(const Job& job, std::int64_t first_row) {
    const auto* x = static_cast<const Bits<kType>*>(job.x) + column;
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const std::int64_t row = first_row + row_of(item, r);
        const auto* at = x + row * job.stride;
        Pair<kType> found{};
        if (row < job.rows && column + 1 < job.dim) {
          found = job.paired ? *reinterpret_cast<const Pair<kType>*>(at) : pair_of<kType>(at[0], at[1]);
        } else if (row < job.rows && column < job.dim) {
          found = pair_of<kType>(at[0], 0);
        }
        held[item][r] = found;
      }
    }
  }

  __device__ void write(const Job& job, std::int64_t first_row, uint2* to) const {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      float2 v[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const bool there = first_row + row_of(item, r) < job.rows;  // otherwise 0, without a shift
        const float2 x = floats_of<kType>(held[item][r]);
        v[r] = make_float2(there ? x.x - shift.x : 0.0f, there ? x.y - shift.y : 0.0f);
      }
      uint2* at = to + row_of(item, 0) / 4 * kPitch + slot;
#pragma unroll
      for (int part = 0; part < kSplits; ++part) {
        const uint4 word = make_uint4(device::pack_bf16(v[0].x, v[1].x), device::pack_bf16(v[2].x, v[3].x),
                                      device::pack_bf16(v[0].y, v[1].y), device::pack_bf16(v[2].y, v[3].y));
        *reinterpret_cast<uint4*>(at + part * kPart) = word;
        if (part + 1 == kSplits) continue;
        less(v[0].x, v[1].x, word.x);
        less(v[2].x, v[3].x, word.y);
        less(v[0].y, v[1].y, word.z);
        less(v[2].y, v[3].y, word.w);
      }
    }
  }
  // Subtracts a part; the remainder is exact.
  static __device__ void less(float& low, float& high, unsigned part) {
    low -= __uint_as_float(part << 16);
    high -= __uint_as_float(part & 0xFFFF0000u);
  }
};

// A tile is covered by 8 warps, two down and four along, each with kSide by kSide pieces of 16 by 8.
template <int kSplits, int kTile>
struct Tile {
  static constexpr int kSide = kTile / 32;
  static constexpr int kPitch = kTile + 4, kPart = kQuads * kPitch;
  static constexpr int kChain = kSplits == 1 ? 2 : 1;  // steps of 16 rows that a tensor core sums in one go

  int down, along;  // where the warp's part of the tile begins
  int lane_row, lane_pair;
  bool diagonal;
  float sums[kSide][kSide][4];
  float* settled;  // this thread's settled sums, kThreads apart

  __device__ Tile(bool diagonal_, float* shared) : diagonal(diagonal_), settled(shared + threadIdx.x) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    down = warp / 4 * (kTile / 2);
    along = warp % 4 * (kTile / 4);
    lane_row = lane / 4;
    lane_pair = lane % 4;
    each([](float& sum, float& before) { sum = before = 0.0f; });
  }
  template <class F>
  __device__ void each(F f) {
#pragma unroll
    for (int m = 0; m < kSide; ++m) {
#pragma unroll
      for (int n = 0; n < kSide; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) f(sums[m][n][e], settled[place(m, n, e)]);
      }
    }
  }
  static __device__ int place(int m, int n, int e) { return ((m * kSide + n) * 4 + e) * kThreads; }

  __device__ void settle() {
    each([](float& sum, float& before) {
      before += sum;
      sum = 0.0f;
    });
  }

  __device__ void add_slab(const uint2* a_slab, const uint2* b_slab) {
    constexpr int kTerms = kSplits == 1 ? 1 : 6;
    constexpr int kLeft[6] = {kSplits - 1, 0, 1, 1, 0, 0};  // the smallest products come first
    constexpr int kRight[6] = {0, kSplits - 1, 1, 0, 1, 0};
#pragma unroll
    for (int step = 0; step < kSlab / 16; step += kChain) {
      unsigned b[kChain][kSplits][kSide][2];
#pragma unroll
      for (int c = 0; c < kChain; ++c) {
#pragma unroll
        for (int part = 0; part < kSplits; ++part) {
#pragma unroll
          for (int n = 0; n < kSide; ++n) {
            const uint2 word = at(b_slab, step + c, part, along + 8 * n);
            b[c][part][n][0] = word.x;
            b[c][part][n][1] = word.y;
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kSide; ++m) {
        if (diagonal && down + 16 * m + 15 < along) continue;
        unsigned a[kChain][kSplits][4];
#pragma unroll
        for (int c = 0; c < kChain; ++c) {
#pragma unroll
          for (int part = 0; part < kSplits; ++part) {
            const uint2 upper = at(a_slab, step + c, part, down + 16 * m);
            const uint2 lower = at(a_slab, step + c, part, down + 16 * m + 8);
            a[c][part][0] = upper.x;
            a[c][part][1] = lower.x;
            a[c][part][2] = upper.y;
            a[c][part][3] = lower.y;
          }
        }
        float product[kSide][4] = {};
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          const int left = kSplits == 1 ? 0 : kLeft[term], right = kSplits == 1 ? 0 : kRight[term];
#pragma unroll
          for (int c = 0; c < kChain; ++c) {
#pragma unroll
            for (int n = 0; n < kSide; ++n) device::mma_bf16(product[n], a[c][left], b[c][right][n]);
          }
        }
#pragma unroll
        for (int n = 0; n < kSide; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[m][n][e] += product[n][e];
        }
      }
    }
  }
  __device__ uint2 at(const uint2* slab, int step, int part, int column) const {
    return slab[part * kPart + (4 * step + lane_pair) * kPitch + column + lane_row];
  }

  __device__ void flush(const Job& job, int first_row, int first_column) {
#pragma unroll
    for (int m = 0; m < kSide; ++m) {
#pragma unroll
      for (int n = 0; n < kSide; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = first_row + down + 16 * m + 8 * half + lane_row;
          const int j = first_column + along + 8 * n + 2 * lane_pair;
          if (i >= job.dim || j > i) continue;
          const double low = total(m, n, 2 * half), high = total(m, n, 2 * half + 1);
          double* to = job.scatter + static_cast<std::int64_t>(i) * job.dim + j;
          if (job.wide && j < i) {
            double2 both = *reinterpret_cast<const double2*>(to);
            both.x += low;
            both.y += high;
            *reinterpret_cast<double2*>(to) = both;
            continue;
          }
          to[0] += low;
          if (j < i) to[1] += high;
        }
      }
    }
    each([](float& sum, float& before) { sum = before = 0.0f; });
  }
  __device__ double total(int m, int n, int e) const {
    return static_cast<double>(settled[place(m, n, e)]) + sums[m][n][e];
  }
};

template <DType kType, int kSplits, int kTile>
__global__ void __launch_bounds__(kThreads) gram(Job job) {
  using Part = Carried<kType, kSplits, kTile>;
  constexpr int kOperand = kSplits * Part::kPart;
  SCALPEL_DYNAMIC_SHARED(memory);
  auto* shared = reinterpret_cast<uint2*>(memory);  // slab, operand, part, quad, column

  // Tiles are numbered row by row through the lower triangle, the diagonal included.
  const double index = static_cast<double>(blockIdx.x);
  auto row = static_cast<std::int64_t>((sqrt(8.0 * index + 1.0) - 1.0) / 2.0);
  while ((row + 1) * (row + 2) / 2 <= blockIdx.x) ++row;  // corrects for the rounding of the root
  while (row * (row + 1) / 2 > blockIdx.x) --row;
  const int i0 = static_cast<int>(row) * kTile;
  const int j0 = static_cast<int>(blockIdx.x - row * (row + 1) / 2) * kTile;
  const bool diagonal = i0 == j0;

  Tile<kSplits, kTile> tile(diagonal, reinterpret_cast<float*>(shared + 4 * kOperand));
  Part a, b;
  a.begin(job, i0);
  b.begin(job, j0);
  const auto slab = [&](std::int64_t s, int operand) { return shared + ((s % 2) * 2 + operand) * kOperand; };
  const auto read = [&](std::int64_t s) {
    a.read(job, s * kSlab);
    if (!diagonal) b.read(job, s * kSlab);
  };
  const auto write = [&](std::int64_t s) {
    a.write(job, s * kSlab, slab(s, 0));
    if (!diagonal) b.write(job, s * kSlab, slab(s, 1));
  };
  const std::int64_t slabs = (job.rows + kSlab - 1) / kSlab;
  read(0);
  write(0);
  __syncthreads();
  for (std::int64_t s = 0; s < slabs; ++s) {
    if (s + 1 < slabs) read(s + 1);
    tile.add_slab(slab(s, 0), slab(s, diagonal ? 0 : 1));
    if (s + 1 < slabs) write(s + 1);  // its old content was read before the last barrier
    __syncthreads();
    if ((s + 1) % (kFlush<kSplits> / kSlab) == 0) {
      tile.flush(job, i0, j0);
    } else if ((s + 1) % (kSettle<kSplits> / kSlab) == 0) {
      tile.settle();
    }
  }
  tile.flush(job, i0, j0);
}

// Two slabs of two operands, and one tile of float32.
template <int kSplits, int kTile>
constexpr std::size_t shared_bytes() {
  return 4 * sizeof(uint2) * kSplits * Tile<kSplits, kTile>::kPart + sizeof(float) * kTile * kTile;
}

template <DType kType, int kSplits, int kTile>
void start(const Job& job, const CudaQueue& queue) {
  const std::int64_t side = (job.dim + kTile - 1) / kTile;
  device::launch(gram<kType, kSplits, kTile>, dim3(static_cast<unsigned>(side * (side + 1) / 2)),
                 dim3(kThreads), shared_bytes<kSplits, kTile>(), queue, job);
}

template <DType kType>
void run(Job job, int splits, const CudaQueue& queue) {
  constexpr std::int64_t kItem = sizeof(Bits<kType>);
  job.paired = reinterpret_cast<std::uintptr_t>(job.x) % (2 * kItem) == 0 && job.stride % 2 == 0;
  // Both tile sizes give the same bits, because the sum of an entry does not depend on its place in a tile.
  const std::int64_t side = (job.dim + 127) / 128;
  const bool enough = side * (side + 1) / 2 >= device::multiprocessors();
  const std::size_t room = device::most_shared();
  if (splits == 1) {
    const bool large = enough && shared_bytes<1, 128>() <= room;
    return large ? start<kType, 1, 128>(job, queue) : start<kType, 1, 64>(job, queue);
  }
  const bool large = enough && shared_bytes<3, 128>() <= room;
  return large ? start<kType, 3, 128>(job, queue) : start<kType, 3, 64>(job, queue);
}

void check(const TensorView& x, const TensorView& shift, const TensorView& scatter, int splits) {
  const std::int64_t dim = x.width();
  if (x.ndim != 2 || dim < 1 || dim >= std::int64_t{1} << 22 || (dim > 1 && x.strides[1] != 1))
    throw std::invalid_argument("x must be (rows, dim) with stride 1 in the last and dim below 2^22");
  if (x.dtype != DType::kFloat16 && x.dtype != DType::kBFloat16 && x.dtype != DType::kFloat32)
    throw DTypeError(std::string("x is ") + name_of(x.dtype) + "; allowed: float16, bfloat16, float32");
  const bool shifts = shift.data != nullptr;
  if (shifts && (shift.ndim != 1 || shift.shape[0] != dim || shift.dtype != DType::kFloat32 ||
                 (dim > 1 && shift.strides[0] != 1)))
    throw std::invalid_argument("shift must be contiguous float32 of shape (dim,)");
  if (scatter.ndim != 2 || scatter.shape[0] != dim || scatter.shape[1] != dim ||
      scatter.dtype != DType::kFloat64 || (dim > 1 && (scatter.strides[0] != dim || scatter.strides[1] != 1)))
    throw std::invalid_argument("scatter must be contiguous float64 of shape (dim, dim)");
  if (splits != 1 && splits != 3)
    throw std::invalid_argument("splits is " + std::to_string(splits) + "; allowed: 1, 3");
}

}  // namespace

void gram_lower(const TensorView& x, const TensorView& shift, const TensorView& scatter, int splits,
                const CudaQueue& queue) {
  check(x, shift, scatter, splits);
  if (x.shape[0] == 0) return;
  const device::OnDevice on(queue);
  Job job{};
  job.x = x.data;
  job.shift = static_cast<const float*>(shift.data);
  job.scatter = static_cast<double*>(scatter.data);
  job.rows = x.shape[0];
  job.stride = x.strides[0];
  job.dim = static_cast<int>(x.shape[1]);
  job.wide = job.dim % 2 == 0 && reinterpret_cast<std::uintptr_t>(scatter.data) % 16 == 0;
  switch (x.dtype) {
    case DType::kFloat16:
      return run<DType::kFloat16>(job, splits, queue);
    case DType::kBFloat16:
      return run<DType::kBFloat16>(job, splits, queue);
    default:
      return run<DType::kFloat32>(job, splits, queue);
  }
}

}  // namespace scalpel::cuda
