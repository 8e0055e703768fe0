// Linear layers of every format, with every activation.
#include "checks.h"
#include "cpu/dispatch.h"
#include "weight.h"

namespace minilm::tests {
namespace {

Floats run_linear(const Weight& w, const Floats& x, Activation activation, bool accumulate,
                  const Floats& before) {
  const auto& kernels = cpu_kernels();
  LinearParams p = {};
  p.format = w.format, p.activation = activation, p.gated = w.gated, p.accumulate = accumulate;
  p.in = w.in, p.places = w.places, p.columns = w.columns, p.packed = w.packed.data();
  p.rows = static_cast<std::int64_t>(x.size()) / w.in;
  p.x = x.data(), p.x_stride = w.in * 4;
  std::vector<char> prepared;
  if (const std::int64_t bytes = kernels.prepared_row_bytes(w.format, w.in); bytes > 0) {
    p.x_stride = bytes;
    prepared.resize(p.rows * bytes);
    kernels.prepare_rows(w.format, x.data(), w.in, w.in, 0, p.rows, prepared.data());
    p.x = prepared.data();
  }
  Floats y = before;
  p.y = y.data(), p.y_stride = w.columns;
  const std::int64_t panels = (w.columns + kernels.panel - 1) / kernels.panel;
  kernels.linear(p, 0, panels / 2);
  kernels.linear(p, panels / 2, panels);
  return y;
}

void check_linear(Format format, std::int64_t rows, std::int64_t out, std::int64_t in, Activation activation,
                  bool gated, bool accumulate) {
  const Weight w(format, gated ? 2 * out : out, in, gated);
  const Floats x = random_floats(rows * in, 2);
  const Floats before = random_floats(rows * out);
  const Floats y = run_linear(w, x, activation, accumulate, before);
  const Doubles want = w.times(x, activation);
  const std::string name = "linear of format " + std::to_string(static_cast<int>(format)) + ", activation " +
                           std::to_string(static_cast<int>(activation));
  for (std::size_t i = 0; i < y.size(); ++i) {
    expect(name, y[i], want[i] + (accumulate ? before[i] : 0), 1e-5 * (1 + std::abs(want[i])));
  }
  const Floats last(x.end() - in, x.end()), its(before.end() - out, before.end());
  const Floats alone = run_linear(w, last, activation, accumulate, its);
  for (std::int64_t c = 0; c < out; ++c) expect(name + ", a row alone", alone[c], y[(rows - 1) * out + c], 0);
}

// The activations over their whole range, as those of a layer that copies its input.
void check_activations() {
  Floats x;
  for (int i = -4000; i <= 4000; ++i) x.push_back(static_cast<float>(i) / 40);
  for (const float huge : {1e4f, -1e4f, 1e20f, -1e20f}) x.push_back(huge);
  Weight w(Format::kFloat32, 1, 1, false, false);
  Floats scaled = x;
  for (float& v : scaled) v = static_cast<float>(v / w.values[0]);
  for (int a = 0; a <= 6; ++a) {
    const auto activation = static_cast<Activation>(a);
    const Floats y = run_linear(w, scaled, activation, false, Floats(x.size()));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double at = static_cast<double>(scaled[i]) * w.values[0];
      expect("activation " + std::to_string(a), y[i], activated(activation, at),
             1e-6 * (1e-3 + std::abs(at)));
    }
  }
}

}  // namespace

void check_linear_layers() {
  for (const Format format : kFormats) {
    const bool grouped = format == Format::kQ8 || format == Format::kQ4;
    for (const std::int64_t in : {32, 96, 7, 45}) {
      if (grouped && in % kGroup != 0) continue;
      for (const std::int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 26}) {
        const auto activation = static_cast<Activation>(rows % 7);
        check_linear(format, rows, 37, in, activation, rows % 2 == 1 && rows > 2, rows % 4 == 2);
      }
    }
    check_linear(format, 3, 1, 32, Activation::kNone, false, false);
    check_linear(format, 2, 130, 512, Activation::kSilu, true, false);
  }
  check_activations();
}

}  // namespace minilm::tests
