// TopK for x86-64-v4 (AVX-512 F, BW, DQ, VL). CMakeLists.txt gives this file its flags.
// GCC 12 warns of its own header's undefined vectors.
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
