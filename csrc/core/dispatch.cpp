// The table of targets, and the choice among them.
#include "core/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace scalpel {
namespace {

#if defined(SCALPEL_X86_TARGETS)
constexpr bool kX86 = true;
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
bool has_avx512vbmi2() { return has_avx512() && __builtin_cpu_supports("avx512vbmi2"); }
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
#else
constexpr bool kX86 = false;
bool has_avx512() { return false; }
bool has_avx512vbmi2() { return false; }
bool has_avx2() { return false; }
#endif
bool always() { return true; }

constexpr TargetInfo kTargets[kTargetCount] = {
    {Target::kAvx512Vbmi2, "avx512vbmi2", "x86-64-v4 that compresses 16-bit lanes (Ice Lake, Zen 4)",
     "avx512f, avx512bw, avx512dq, avx512vl, avx512vbmi2", kX86, has_avx512vbmi2},
    {Target::kAvx512, "avx512", "x86-64-v4: 512-bit vectors", "avx512f, avx512bw, avx512dq, avx512vl", kX86,
     has_avx512},
    {Target::kAvx2, "avx2", "x86-64-v3: 256-bit vectors and fused multiply-add", "avx2, fma, bmi, bmi2", kX86,
     has_avx2},
    {Target::kPortable, "portable", "the architecture's baseline", "nothing", true, always},
};

std::atomic<const TargetInfo*> chosen{nullptr};

std::string allowed_names() {
  std::string names;
  for (const TargetInfo& t : kTargets) {
    if (t.supported()) names += (names.empty() ? "" : ", ") + std::string(t.name);
  }
  return names;
}

const TargetInfo& pick(const std::string& name, const std::string& source) {
  for (const TargetInfo& t : kTargets) {
    if (name.empty() ? t.supported() : name == t.name) {
      if (t.supported()) return t;
      throw std::invalid_argument(source + " asks for " + name + ", which " +
                                  (t.built ? "this CPU can't run (it needs " + std::string(t.needs) + ")"
                                           : std::string("this build doesn't contain")) +
                                  "; allowed here: " + allowed_names());
    }
  }
  throw std::invalid_argument(source + " is '" + name + "', which is no target; allowed here: " +
                              allowed_names() + " (or unset it for the fastest)");
}

std::string from_environment() {
  const char* value = std::getenv("SCALPEL_TARGET");
  return value == nullptr ? "" : value;
}

}  // namespace

const TargetInfo* targets() { return kTargets; }

const TargetInfo& active_target() {
  const TargetInfo* now = chosen.load(std::memory_order_acquire);
  if (now != nullptr) return *now;
  // Two threads that both make the first call read the same environment, so they choose the same target.
  const TargetInfo& picked = pick(from_environment(), "SCALPEL_TARGET");
  const TargetInfo* unset = nullptr;
  chosen.compare_exchange_strong(unset, &picked, std::memory_order_acq_rel);
  return *chosen.load(std::memory_order_acquire);
}

void force_target(const std::string& name) {
  chosen.store(&pick(name.empty() ? from_environment() : name, name.empty() ? "SCALPEL_TARGET" : "target"),
               std::memory_order_release);
}

}  // namespace scalpel
