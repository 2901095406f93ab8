// Scatter tiles for the architecture's baseline. CMakeLists.txt gives this file its flags.
#include "covariance/kernel.h"

namespace scalpel {
namespace {
#include "covariance/kernel_body.inc"
}  // namespace

const CovarianceKernels& covariance_portable() { return kKernels; }

}  // namespace scalpel
