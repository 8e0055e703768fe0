// Large pages for what is read from end to end: a table of 4 KiB pages for a model's weights does not fit in
// the processor's cache of addresses.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace minilm {

// Asks for 2 MiB pages, before memory is first written to; where there are none, nothing happens.
inline void prefer_large_pages(void* memory, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace minilm
