#include "cpu/dispatch.h"

#include <stdexcept>

namespace minilm {

// A table for each instruction set (table.cpp); setup.py compiles the kernels once for each and says here
// which ones there are.
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

namespace {

struct Candidate {
  const CpuKernels* kernels;
  bool runs_here;  // processor and operating system
};

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> table = {
#ifdef MINILM_HAS_GENERIC
      {&generic::kKernels, true},
#endif
#ifdef MINILM_HAS_AVX2
      {&avx2::kKernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#ifdef MINILM_HAS_AVX512
      {&avx512::kKernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
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
