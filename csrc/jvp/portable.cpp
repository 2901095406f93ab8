// Tangents for the architecture's baseline instruction set. CMakeLists.txt sets this file's compiler flags.
#include "jvp/kernel.h"

namespace scalpel {
namespace {
#include "jvp/kernel_body.inc"
}  // namespace

const JvpKernels& jvp_portable() { return kKernels; }

}  // namespace scalpel
