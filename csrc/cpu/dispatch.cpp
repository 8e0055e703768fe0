#include "cpu/dispatch.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace minilm {

// One table per instruction set (table.cpp); setup.py compiles the kernels once for each, and defines here
// which ones exist.
#ifdef MINILM_HAS_GENERIC
namespace generic {
extern const CpuKernels kKernels;
}
#endif
#ifdef MINILM_HAS_AVX2
namespace avx2 {
extern const CpuKernels kKernels;
}
#endif
#ifdef MINILM_HAS_AVX512
namespace avx512 {
extern const CpuKernels kKernels;
}
#endif
#ifdef MINILM_HAS_AVX512_VNNI
namespace avx512_vnni {
extern const CpuKernels kKernels;
}
#endif
#ifdef MINILM_HAS_AVX512_BF16
namespace avx512_bf16 {
extern const CpuKernels kKernels;
}
#endif
#ifdef MINILM_HAS_NEON_DOTPROD
namespace neon_dotprod {
extern const CpuKernels kKernels;
}
#endif

namespace {

struct Candidate {
  const CpuKernels* kernels;
  bool runs_here;  // processor and operating system
};

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
  unsigned a, b, c, d;  // clang's __builtin_cpu_supports does not know f16c
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
[[maybe_unused]] bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#elif defined(__aarch64__) && defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#elif defined(__aarch64__)
bool has_dotprod() { return true; }  // every processor of Apple's that runs macOS
#endif

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> table = {
#ifdef MINILM_HAS_GENERIC
      {&generic::kKernels, true},
#endif
#ifdef MINILM_HAS_AVX2
      {&avx2::kKernels, has_avx2()},
#endif
#ifdef MINILM_HAS_AVX512
      {&avx512::kKernels, has_avx512()},
#endif
#ifdef MINILM_HAS_AVX512_VNNI
      {&avx512_vnni::kKernels, has_avx512_vnni()},
#endif
#ifdef MINILM_HAS_AVX512_BF16
      {&avx512_bf16::kKernels, has_avx512_vnni() && __builtin_cpu_supports("avx512bf16")},
#endif
#ifdef MINILM_HAS_NEON_DOTPROD
      {&neon_dotprod::kKernels, has_dotprod()},
#endif
  };
  return table;
}

const CpuKernels* selected = nullptr;

}  // namespace

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.runs_here) names.emplace_back(candidate.kernels->name);
  }
  return names;
}

void select_isa(const std::string& wanted) {
  std::string known;
  for (const Candidate& candidate : candidates()) {
    const std::string name = candidate.kernels->name;
    known += (known.empty() ? "" : ", ") + name;
    if (wanted.empty() ? candidate.runs_here : wanted == name) {
      if (!candidate.runs_here) throw std::runtime_error("this processor cannot run " + name);
      selected = candidate.kernels;
      if (!wanted.empty()) return;
    }
  }
  if (!wanted.empty()) throw std::runtime_error("unknown instruction set; expected one of " + known);
}

const CpuKernels& cpu_kernels() { return *selected; }

}  // namespace minilm
