// Fresh memory.
#pragma once

#include <cstdint>

namespace scalpel {

// Asks for huge pages in [address, address + bytes), which should not have been touched yet: where the system
// gives them on request (Linux: transparent_hugepage is "madvise"), its first use then costs one fault in
// 2 MiB and not one in 4 KiB. A hint: nothing changes where it can't be followed, or below 4 MiB.
void prefer_huge_pages(void* address, std::int64_t bytes);

}  // namespace scalpel
