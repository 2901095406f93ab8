// Scatter tiles for the architecture's baseline instruction set. CMakeLists.txt sets this file's compiler
// flags.
#include "covariance/kernel.h"

namespace scalpel {
namespace {
#include "covariance/kernel_body.inc"
}  // namespace

const CovarianceKernels& covariance_portable() { return kKernels; }

}  // namespace scalpel
