// Which instruction set the kernels of this process use. One binary carries a copy of every kernel for each
// target; the first supported one in priority order is taken, unless SCALPEL_TARGET names another.
#pragma once

#include <string>

namespace scalpel {

enum class Target : int { kAvx512Vbmi2, kAvx512, kAvx2, kPortable };
inline constexpr int kTargetCount = 4;

struct TargetInfo {
  Target target;
  const char* name;         // the value of SCALPEL_TARGET that forces it
  const char* description;  // for people
  const char* needs;        // CPU features, for messages
  bool built;               // compiled into this binary
  bool (*cpu_has_needs)();  // asked of the CPU at run time
  bool supported() const { return built && cpu_has_needs(); }
};

// All targets, the most wanted first. Has kTargetCount entries, indexed by Target.
const TargetInfo* targets();

// The target in use. The first call reads SCALPEL_TARGET.
// Throws std::invalid_argument when it names no target or one that can't run here.
const TargetInfo& active_target();

// Replaces the choice for the whole process, for tests and comparisons: a name, or "" for the default.
// Throws std::invalid_argument as above and then leaves the choice as it was.
void force_target(const std::string& name);

}  // namespace scalpel
