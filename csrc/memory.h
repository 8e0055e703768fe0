// Huge pages for memory that is read sequentially: a model's weights in 4 KiB pages exceed the TLB. And
// memory that is given back before it is freed.
#pragma once

#include <sys/mman.h>
#ifdef __linux__
#include <link.h>
#include <unistd.h>
#endif

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

// Unmaps the pages of programs and libraries that cannot have been changed: code, and tables of the linker. A
// start touches many that are never used again. Those that are, come back from the system's file cache.
inline void unmap_code() {
#ifdef __linux__
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void*) {
        const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
        const ElfW(Phdr)* const end = info->dlpi_phdr + info->dlpi_phnum;
        for (const ElfW(Phdr)* at = info->dlpi_phdr; at < end; ++at) {
          if (at->p_type != PT_DYNAMIC) continue;
          const auto* entry = reinterpret_cast<const ElfW(Dyn)*>(info->dlpi_addr + at->p_vaddr);
          for (; entry->d_tag != DT_NULL; ++entry) {
            if (entry->d_tag == DT_TEXTREL) return 0;  // its code was changed when it was loaded
          }
        }
        for (const ElfW(Phdr)* at = info->dlpi_phdr; at < end; ++at) {
          if (at->p_type != PT_LOAD || (at->p_flags & PF_W) != 0) continue;
          const std::uintptr_t first = (info->dlpi_addr + at->p_vaddr) / page * page;
          const std::uintptr_t last = (info->dlpi_addr + at->p_vaddr + at->p_filesz) / page * page;
          if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
        }
        return 0;
      },
      nullptr);
#endif
}

}  // namespace minilm
