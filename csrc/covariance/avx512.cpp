// Scatter tiles for x86-64-v4 (AVX-512 F, BW, DQ, VL). CMakeLists.txt sets this file's compiler flags.
#include "covariance/kernel.h"

namespace scalpel {
namespace {
#include "covariance/kernel_body.inc"
}  // namespace

const CovarianceKernels& covariance_avx512() { return kKernels; }

}  // namespace scalpel
