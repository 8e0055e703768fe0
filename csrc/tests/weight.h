// A packed weight beside the numbers that it stands for.
#pragma once

#include "cpu/dispatch.h"
#include "numbers.h"

namespace minilm::tests {

inline double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::kGelu:
      return x / 2 * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return x / 2 * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kRelu:
      return x < 0 ? 0 : x;
    case Activation::kQuickGelu:
      return x / (1 + std::exp(-1.702 * x));
    case Activation::kTanh:
      return std::tanh(x);
    default:
      return x;
  }
}

constexpr Format kFormats[] = {Format::kFloat32, Format::kBFloat16, Format::kFloat16,
                               Format::kInt8,    Format::kQ8,       Format::kQ4};

// A weight [out, in], packed, and the numbers that it stands for. Gated: the first half of out is gate.
struct Weight {
  Format format;
  std::int64_t out, in, places, columns;
  bool gated;
  Doubles values;
  Floats bias;
  std::vector<char> packed;

  Weight(Format format, std::int64_t out, std::int64_t in, bool gated = false, bool with_bias = true)
      : format(format), out(out), in(in), gated(gated), values(out * in) {
    const std::int64_t panel = cpu_kernels().panel;
    columns = gated ? out / 2 : out;
    const std::int64_t panels = (columns + panel - 1) / panel;
    places = panels * panel * (gated ? 2 : 1);
    std::vector<std::int32_t> order(places);
    for (std::int64_t place = 0; place < places; ++place) {
      const std::int64_t number = place / panel, half = gated ? number % 2 : 0;
      const std::int64_t column = (gated ? number / 2 : number) * panel + place % panel;
      order[place] = static_cast<std::int32_t>(column < columns ? column + half * columns : -1);
    }
    bias = with_bias ? random_floats(out) : Floats(out, 0.0f);
    PackParams p = {};
    p.format = format, p.out = out, p.in = in, p.order = order.data(), p.places = places;
    p.bias = with_bias ? bias.data() : nullptr;
    const float size = 1 / std::sqrt(static_cast<float>(in));
    if (format < Format::kInt8) {
      const DType types[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
      const Array array = random_array(types[static_cast<int>(format)], out * in, size);
      values = array.values;
      p.values = array.bytes.data();
      finish(p);
      return;
    }
    const std::int64_t length = format == Format::kInt8 ? in : kGroup, groups = in / length;
    std::vector<std::uint8_t> codes(format == Format::kQ4 ? out * in / 2 : out * in);
    for (auto& code : codes) code = static_cast<std::uint8_t>(random_below(4) ? random_below(256) : 0x80);
    const Array scales = random_array(DType::kFloat16, out * groups, size / 100);
    const Array minimums = random_array(DType::kFloat16, out * groups, size / 10);
    const Floats scale(scales.values.begin(), scales.values.end());
    const Floats minimum(minimums.values.begin(), minimums.values.end());
    for (std::int64_t i = 0; i < out * in; ++i) {
      const std::int64_t group = i / length;
      const int byte = format == Format::kQ4 ? codes[i / kGroup * 16 + i % 16] : codes[i];
      const int nibble = i % kGroup < 16 ? byte & 15 : byte >> 4;
      const int code = format == Format::kQ4 ? nibble : static_cast<std::int8_t>(byte);
      values[i] = scales.values[group] * code + (format == Format::kQ4 ? minimums.values[group] : 0);
    }
    p.values = codes.data(), p.scales = scale.data();
    p.minimums = format == Format::kQ4 ? minimum.data() : nullptr;
    finish(p);
  }

  void finish(PackParams& p) {
    packed.resize(cpu_kernels().packed_bytes(format, in, places));
    p.packed = packed.data();
    cpu_kernels().pack(p);
  }

  // Whether x is rounded to bfloat16.
  bool rounds() const {
    return format == Format::kBFloat16 && cpu_kernels().prepared_row_bytes(format, in) > 0;
  }

  // What the layer sees of x: that in bfloat16, or its codes times their scale, or x itself.
  Doubles seen(const Floats& x) const {
    Doubles out(x.begin(), x.end());
    if (rounds()) {
      for (double& value : out) value = rounded(DType::kBFloat16, value);
    }
    if (format < Format::kInt8) return out;
    const bool skewed = format != Format::kQ4;
    const std::int64_t length = format == Format::kInt8 ? 192 : kGroup;
    for (std::int64_t row = 0; row < static_cast<std::int64_t>(x.size()); row += in) {
      for (std::int64_t first = row; first < row + in; first += length) {
        const std::int64_t last = std::min(first + length, row + in);
        float low = 0, high = 0;
        for (std::int64_t i = first; i < last; ++i) low = std::min(low, x[i]), high = std::max(high, x[i]);
        const float extent = skewed ? 0.5f * high - 0.5f * low : std::max(high, -low);
        const float count = skewed ? 126.99f : 127.0f, inverse = extent > 0 ? count / extent : 0.0f;
        for (std::int64_t i = first; i < last; ++i) {
          const float scaled = x[i] * inverse;
          out[i] = std::nearbyint(scaled) * static_cast<double>(extent / count);
        }
      }
    }
    return out;
  }

  // activation(x W^T + bias), and gated.
  Doubles times(const Floats& x, Activation activation, bool with_gate = true) const {
    const Doubles rows = seen(x);
    const std::int64_t count = static_cast<std::int64_t>(x.size()) / in;
    Doubles y(count * columns);
    for (std::int64_t r = 0; r < count; ++r) {
      for (std::int64_t c = 0; c < columns; ++c) {
        double sums[2] = {bias[c], gated ? bias[columns + c] : 0};
        for (std::int64_t k = 0; k < in; ++k) {
          sums[0] += rows[r * in + k] * values[c * in + k];
          if (gated) sums[1] += rows[r * in + k] * values[(columns + c) * in + k];
        }
        y[r * columns + c] = activated(activation, sums[0]) * (gated && with_gate ? sums[1] : 1);
      }
    }
    return y;
  }
};

}  // namespace minilm::tests
