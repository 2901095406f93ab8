// TopK for x86-64-v3 (AVX2, FMA, BMI). CMakeLists.txt gives this file its flags.
#include "topk/kernel.h"

namespace scalpel {
namespace {
#include "topk/kernel_body.inc"
}  // namespace

const TopKKernels& topk_avx2() { return kKernels; }

}  // namespace scalpel
