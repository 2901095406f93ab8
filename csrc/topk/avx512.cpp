// TopK for x86-64-v4 (AVX-512 F, BW, DQ, VL). CMakeLists.txt sets this file's compiler flags.
//
// GCC 12 warns about undefined vectors in its own header, so those warnings are off while it is included.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "topk/kernel.h"

namespace scalpel {
namespace {

#include "topk/avx512_lanes.inc"
#include "topk/kernel_body.inc"

}  // namespace

const TopKKernels& topk_avx512() { return kKernels; }

}  // namespace scalpel
