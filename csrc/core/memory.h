// Fresh memory.
#pragma once

#include <cstdint>

namespace scalpel {

// Asks for huge pages in [address, address + bytes): where the system gives them on request (Linux:
// transparent_hugepage is "madvise"), the first use of fresh memory then costs one fault in 2 MiB and not one
// in 4 KiB. Memory that was used before keeps its pages and its contents. A hint: nothing changes where it
// can't be followed, or below 4 MiB.
void prefer_huge_pages(void* address, std::int64_t bytes);

}  // namespace scalpel
