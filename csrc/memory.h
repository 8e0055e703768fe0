// Huge pages for memory that is read sequentially: a model's weights in 4 KiB pages exceed the TLB. And
// memory that is given back before it is freed.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace minilm {

constexpr std::uintptr_t kLargePage = std::uintptr_t{1} << 21;

// Requests 2 MiB pages for memory whose contents are not needed. Memory that an allocator reuses has small
// pages, which are freed first. If there are no huge pages, nothing else happens.
inline void prefer_large_pages(void* memory, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  const std::uintptr_t begin =
      (reinterpret_cast<std::uintptr_t>(memory) + kLargePage - 1) / kLargePage * kLargePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / kLargePage * kLargePage;
  if (begin >= end) return;
  if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }
#else
  (void)memory;
  (void)bytes;
#endif
}

// Gives the whole large pages in private memory back to the system; they are zero from then on. The memory
// stays allocated.
inline void give_back(void* memory, std::size_t bytes) {
#ifdef MADV_DONTNEED
  const std::uintptr_t begin =
      (reinterpret_cast<std::uintptr_t>(memory) + kLargePage - 1) / kLargePage * kLargePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace minilm
