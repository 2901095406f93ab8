// TopK for x86-64-v4 (AVX-512 F, BW, DQ, VL). CMakeLists.txt gives this file its flags.
#include "topk/kernel.h"

namespace scalpel {
namespace {
#include "topk/kernel_body.inc"
}  // namespace

const TopKKernels& topk_avx512() { return kKernels; }

}  // namespace scalpel
