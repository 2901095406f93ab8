// Tangents for x86-64-v3 (AVX2, FMA). CMakeLists.txt sets this file's compiler flags.
#include "jvp/kernel.h"

namespace scalpel {
namespace {
#include "jvp/kernel_body.inc"
}  // namespace

const JvpKernels& jvp_avx2() { return kKernels; }

}  // namespace scalpel
