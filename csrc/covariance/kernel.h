// What moments.cpp and the files of the targets agree on. Internal.
#pragma once

#include <cstdint>

namespace scalpel {

// Columns in a panel, and the side of a tile of the scatter. A panel holds some rows of kPanel columns, row
// after row, 64-byte aligned.
inline constexpr std::int64_t kPanel = 16;

struct CovarianceKernels {
  const char* compiled_for;
  std::uint64_t* calls;
  // tile[i][j] = sum over r of a[r][i] * b[r][j], over `rows` rows of two panels, in the order of the rows.
  void (*tile)(const double* a, const double* b, std::int64_t rows, double* tile);
};

const CovarianceKernels& covariance_portable();
const CovarianceKernels& covariance_avx2();
const CovarianceKernels& covariance_avx512();

}  // namespace scalpel
