// Tangents for the architecture's baseline. CMakeLists.txt gives this file its flags.
#include "jvp/kernel.h"

namespace scalpel {
namespace {
#include "jvp/kernel_body.inc"
}  // namespace

const JvpKernels& jvp_portable() { return kKernels; }

}  // namespace scalpel
