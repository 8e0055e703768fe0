// Calls each CPU kernel once at a fixed size, for callgrind to count its instructions: instruction_counts
// ISA. Links the kernels of csrc/cpu/ without torch. A new kernel is one more line in `cases`.
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "params.h"

namespace {

using minilm::DType;

// Values that no branch of a kernel depends on; the same bits at every run.
std::vector<float> values(std::int64_t count, std::uint32_t seed) {
  std::vector<float> out(count);
  for (auto& v : out) {
    seed = seed * 1664525u + 1013904223u;
    v = float(seed >> 8) * 0x1p-23f - 1.0f;
  }
  return out;
}

// bfloat16 by truncation.
std::vector<std::uint16_t> halves(const std::vector<float>& wide) {
  std::vector<std::uint16_t> out;
  for (const float v : wide) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    out.push_back(std::uint16_t(bits >> 16));
  }
  return out;
}

struct Case {
  std::string name;
  std::int64_t elements;
  std::function<void()> run;
};

Case layer_norm(std::int64_t rows, std::int64_t channels, bool add, bool half) {
  auto wide = std::make_shared<std::vector<std::vector<float>>>();
  for (std::uint32_t i = 0; i < 2; ++i) wide->push_back(values(rows * channels, i + 1));
  for (std::uint32_t i = 2; i < 4; ++i) wide->push_back(values(channels, i + 1));
  for (int i = 0; i < 2; ++i) wide->emplace_back(rows * channels);
  for (int i = 0; i < 2; ++i) wide->emplace_back(rows);
  auto narrow = std::make_shared<std::vector<std::vector<std::uint16_t>>>();
  for (int i = 0; i < 6; ++i) narrow->push_back(halves((*wide)[i]));
  auto at = [=](int i) {
    return half && i < 6 ? static_cast<void*>((*narrow)[i].data()) : (*wide)[i].data();
  };
  minilm::LayerNormParams p = {};
  p.x = at(0);
  p.residual = add ? at(1) : nullptr;
  p.weight = at(2);
  p.bias = at(3);
  p.y = at(4);
  p.sum = add ? at(5) : nullptr;
  p.mean = at(6);
  p.rstd = at(7);
  p.channels = p.x_stride = p.residual_stride = channels;
  p.eps = 1e-5;
  p.dtype = p.parameter_dtype = half ? DType::kBFloat16 : DType::kFloat32;
  const std::string name = std::string(add ? "add_layer_norm" : "layer_norm") +
                           (half ? " bfloat16 " : " float32 ") + std::to_string(rows) + " x " +
                           std::to_string(channels);
  return {name, rows * channels,
          [=] { (void)wide, (void)narrow, minilm::cpu_kernels().layer_norm(p, 0, rows); }};
}

std::vector<Case> cases() {
  return {
      layer_norm(64, 384, true, false),  // MiniLM
      layer_norm(64, 384, false, false), layer_norm(64, 384, true, true),
      layer_norm(64, 768, true, false),  // BERT-base
      layer_norm(64, 771, true, false),  // a tail after the last vector
  };
}

}  // namespace

// callgrind counts what is inside, and writes a file each time it returns.
extern "C" __attribute__((noinline)) void measured(const std::function<void()>& run) {
  run();
  asm volatile("" ::: "memory");
}

int main(int count, char** arguments) {
  minilm::select_isa(count > 1 ? arguments[1] : "");
  for (const Case& c : cases()) {
    std::printf("%lld\t%s\n", static_cast<long long>(c.elements), c.name.c_str());
    measured(c.run);
  }
}
