// What block.cpp, moments.cpp and the files of the targets agree on. Internal.
#pragma once

#include <cstdint>

namespace scalpel {

// A panel holds some rows of as many columns as fit 128 bytes, row after row, 64-byte aligned: 32 float32 or
// 16 float64 columns. That is also the side of a tile of the scatter.
inline constexpr std::int64_t kPanelBytes = 128;

// What is done to rows of one dtype. `stride` is in elements; doubles hold every value of every dtype.
struct RowKernels {
  // Whether one of n entries is a NaN, an infinity, or beyond `most` in size.
  bool (*has_bad)(const void* row, std::int64_t n, double most);
  // sums[c] += x[r][c] - start[c], in the order of the rows; peaks[c] becomes at least the largest |x -
  // start|.
  void (*add_to_sums)(const void* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                      const double* start, double* sums, double* peaks);
  // A panel of x - shift, its columns from `used` on zero: float64 of a float64 x, else float32, rounded
  // once.
  void (*pack)(const void* x, std::int64_t stride, std::int64_t rows, std::int64_t used, const double* shift,
               void* panel);
  // The same in float64, whatever x is.
  void (*pack_wide)(const void* x, std::int64_t stride, std::int64_t rows, std::int64_t used,
                    const double* shift, void* panel);
  // out = row - shift over n entries, as a panel's; returns the sum of squares of what is written.
  double (*center)(const void* row, std::int64_t n, const double* shift, void* out);
  bool narrow;  // panels are float32
};

struct CovarianceKernels {
  const char* compiled_for;
  std::uint64_t* calls;
  RowKernels float16, bfloat16, float32, float64;
  // tile[i][j] += sum over r of a[r][i] * b[r][j], over `rows` rows of two panels, in the order of the rows
  // and in the panels' precision; the sum is then added in float64.
  void (*tile_float32)(const float* a, const float* b, std::int64_t rows, double* tile);
  void (*tile_float64)(const double* a, const double* b, std::int64_t rows, double* tile);
  // scatter[i][j] += tile[i][j] + down[i] * along[j] for i < rows, j < min(columns, below + i + 1): with
  // `below` the row of the tile's first row less the column of its first column, what is on or under the
  // diagonal.
  void (*join)(const double* tile, std::int64_t width, std::int64_t rows, std::int64_t columns,
               std::int64_t below, const double* down, const double* along, double* scatter,
               std::int64_t stride);
};

const CovarianceKernels& covariance_portable();
const CovarianceKernels& covariance_avx2();
const CovarianceKernels& covariance_avx512();

}  // namespace scalpel
