// Chooses the instruction set that the kernels of this process use. One binary carries a copy of every
// kernel for each target: the file grows by the number of targets, and in return one wheel is fast on every
// CPU. The first supported target in priority order is taken, unless SCALPEL_TARGET names another.
#pragma once

#include <string>

namespace scalpel {

enum class Target : int { kAvx512Vbmi2, kAvx512, kAvx2, kPortable };
inline constexpr int kTargetCount = 4;

struct TargetInfo {
  Target target;
  const char* name;         // the value of SCALPEL_TARGET that forces it
  const char* description;  // one line for a person to read
  const char* needs;        // the CPU features that it needs, for error messages
  bool built;               // compiled into this binary
  bool (*cpu_has_needs)();  // asks the CPU at run time
  bool supported() const { return built && cpu_has_needs(); }
};

// All targets in order of preference, the fastest first: kTargetCount entries, indexed by Target.
const TargetInfo* targets();

// The target in use. The first call reads SCALPEL_TARGET. Throws std::invalid_argument when the variable
// names no target, or one that cannot run here.
const TargetInfo& active_target();

// Replaces the choice for the whole process; meant for tests and comparisons. `name` is a target's name, or
// "" for the default. Throws std::invalid_argument as above, and then leaves the choice as it was.
void force_target(const std::string& name);

}  // namespace scalpel
