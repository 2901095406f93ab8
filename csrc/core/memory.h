// Requests huge pages for large buffers, because page faults can cost more than the kernel that fills them.
#pragma once

#include <cstdint>

namespace scalpel {

// Asks the system for huge pages in [address, address + bytes). Where the system grants them on request
// (Linux with transparent_hugepage set to "madvise"), the first use of fresh memory then costs one page
// fault per 2 MiB instead of one per 4 KiB. Memory that has been used before keeps its pages and its
// contents. This is only a hint: below 4 MiB, and where the system cannot follow it, nothing happens.
void prefer_huge_pages(void* address, std::int64_t bytes);

}  // namespace scalpel
