// TopK for the architecture's baseline. CMakeLists.txt gives this file its flags.
#include "topk/kernel.h"

namespace scalpel {
namespace {
#include "topk/kernel_body.inc"
}  // namespace

const TopKKernels& topk_portable() { return kKernels; }

}  // namespace scalpel
