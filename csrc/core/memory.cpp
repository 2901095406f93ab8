#include "core/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace scalpel {

void prefer_huge_pages([[maybe_unused]] void* address, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::int64_t kWorthIt = std::int64_t{4} << 20;
  if (bytes < kWorthIt) return;
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<std::uintptr_t>(address) + page - 1) / page * page;
  const auto end =
      (reinterpret_cast<std::uintptr_t>(address) + static_cast<std::uintptr_t>(bytes)) / page * page;
  // The result is ignored, because a refusal is not an error.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace scalpel
