// The interface between block.cpp, moments.cpp and the targets' files. Internal: the kernels take raw
// pointers and sizes, because everything has been checked before.
#pragma once

#include <cstdint>

namespace scalpel {

// A panel holds some rows of as many columns as fit 128 bytes (32 float32 or 16 float64 columns), row after
// row, 64-byte aligned. A tile of the scatter has as many rows and columns.
inline constexpr std::int64_t kPanelBytes = 128;

// The operations on rows of one dtype. `stride` is in elements. double represents the values of every dtype.
struct RowKernels {
  // True if one of n entries is NaN, infinite, or larger than `most` in size.
  bool (*has_bad)(const void* row, std::int64_t n, double most);
  // sums[c] += x[r][c] - start[c], in the order of the rows. peaks[c] becomes at least the largest |x -
  // start|.
  void (*add_to_sums)(const void* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                      const double* start, double* sums, double* peaks);
  // Writes a panel of x - shift, rounded once: float64 if x is, otherwise float32. Columns from `used` on
  // are zero.
  void (*pack)(const void* x, std::int64_t stride, std::int64_t rows, std::int64_t used, const double* shift,
               void* panel);
  // The same in float64, whatever the dtype of x.
  void (*pack_wide)(const void* x, std::int64_t stride, std::int64_t rows, std::int64_t used,
                    const double* shift, void* panel);
  // Writes out = row - shift over n entries, in the dtype of a panel. Returns the sum of squares of what it
  // wrote.
  double (*center)(const void* row, std::int64_t n, const double* shift, void* out);
  bool narrow;  // panels are float32
};

struct CovarianceKernels {
  const char* compiled_for;
  std::uint64_t* calls;
  RowKernels float16, bfloat16, float32, float64;
  // tile[i][j] += sum over r of a[r][i] * b[r][j], over `rows` rows of two panels. The sum runs in the order
  // of the rows and in the panels' precision; its result is then added in float64.
  void (*tile_float32)(const float* a, const float* b, std::int64_t rows, double* tile);
  void (*tile_float64)(const double* a, const double* b, std::int64_t rows, double* tile);
  // scatter[i][j] += tile[i][j] + down[i] * along[j] for i < rows and j < min(columns, below + i + 1).
  // `below` is the row of the tile's first row minus the column of its first column, so that only entries on
  // or below the diagonal are written.
  void (*join)(const double* tile, std::int64_t width, std::int64_t rows, std::int64_t columns,
               std::int64_t below, const double* down, const double* along, double* scatter,
               std::int64_t stride);
};

const CovarianceKernels& covariance_portable();
const CovarianceKernels& covariance_avx2();
const CovarianceKernels& covariance_avx512();

}  // namespace scalpel
