// Tangents for x86-64-v4 (AVX-512 F, BW, DQ, VL). CMakeLists.txt sets this file's compiler flags.
#include "jvp/kernel.h"

namespace scalpel {
namespace {
#include "jvp/kernel_body.inc"
}  // namespace

const JvpKernels& jvp_avx512() { return kKernels; }

}  // namespace scalpel
