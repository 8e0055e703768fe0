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
using minilm::Format;

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

// x W^T of `rows` rows, with a weight [out, in] that is packed before; rows of x are prepared with it.
Case linear(Format format, const char* name, std::int64_t rows, std::int64_t out, std::int64_t in) {
  const auto& kernels = minilm::cpu_kernels();
  const bool quantised = format >= Format::kInt8;
  const std::vector<float> weights = values(out * in, 1), scales = values(out * (in / 32), 2);
  std::vector<std::int32_t> order;
  for (std::int64_t i = 0; i < out; ++i) order.push_back(static_cast<std::int32_t>(i));
  auto packed = std::make_shared<std::vector<char>>(kernels.packed_bytes(format, in, out));
  minilm::PackParams pack = {};
  pack.format = format;
  pack.out = pack.places = out;
  pack.in = in;
  pack.values = weights.data();  // any bits will do for codes
  pack.scales = quantised ? scales.data() : nullptr;
  pack.minimums = format == Format::kQ4 ? scales.data() : nullptr;
  pack.order = order.data();
  pack.packed = packed->data();
  kernels.pack(pack);
  auto x = std::make_shared<std::vector<float>>(values(rows * in, 3));
  auto y = std::make_shared<std::vector<float>>(rows * out);
  const std::int64_t row_bytes = kernels.prepared_row_bytes(format, in);
  auto prepared = std::make_shared<std::vector<char>>(rows * row_bytes);
  minilm::LinearParams p = {};
  p.format = format;
  p.in = in;
  p.places = p.columns = p.y_stride = out;
  p.packed = packed->data();
  p.x = row_bytes > 0 ? static_cast<const void*>(prepared->data()) : x->data();
  p.x_stride = row_bytes > 0 ? row_bytes : in * 4;
  p.rows = rows;
  p.y = y->data();
  const std::string title = std::string("linear ") + name + ", rows " + std::to_string(rows) + ", " +
                            std::to_string(out) + " x " + std::to_string(in);
  return {title, out * in, [=] {
            (void)packed, (void)y;
            const auto& kernels = minilm::cpu_kernels();
            if (row_bytes > 0) kernels.prepare_rows(format, x->data(), in, in, 0, rows, prepared->data());
            kernels.linear(p, 0, out / kernels.panel);
          }};
}

std::vector<Case> cases() {
  std::vector<Case> all = {
      layer_norm(64, 384, true, false),  // MiniLM
      layer_norm(64, 384, false, false), layer_norm(64, 384, true, true),
      layer_norm(64, 768, true, false),  // BERT-base
      layer_norm(64, 771, true, false),  // a tail after the last vector
  };
  for (const std::int64_t rows : {1, 24}) {  // decoding, and whole tiles
    all.push_back(linear(Format::kFloat32, "float32", rows, 64, 576));
    all.push_back(linear(Format::kBFloat16, "bfloat16", rows, 64, 576));
    all.push_back(linear(Format::kInt8, "int8", rows, 64, 576));
    all.push_back(linear(Format::kQ8, "q8", rows, 64, 576));
    all.push_back(linear(Format::kQ4, "q4", rows, 64, 576));
  }
  return all;
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
