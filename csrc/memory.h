// Large pages for what is read from end to end: a table of 4 KiB pages for a model's weights does not fit in
// the processor's cache of addresses.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace minilm {

// Asks for 2 MiB pages for memory whose content is not needed: what an allocator hands out again has small
// pages from before, which are given back. Where there are no large ones, nothing else happens.
inline void prefer_large_pages(void* memory, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin >= end) return;
  if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace minilm
