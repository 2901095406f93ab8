// Scatter tiles for x86-64-v3 (AVX2, FMA, BMI). CMakeLists.txt sets this file's compiler flags.
#include "covariance/kernel.h"

namespace scalpel {
namespace {
#include "covariance/kernel_body.inc"
}  // namespace

const CovarianceKernels& covariance_avx2() { return kKernels; }

}  // namespace scalpel
