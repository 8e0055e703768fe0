// Norms, with and without what is added before.
#include "checks.h"
#include "cpu/dispatch.h"
#include "numbers.h"

namespace minilm::tests {
namespace {

void check_norms(DType type, DType parameters, std::int64_t rows, std::int64_t channels, bool add,
                 bool bias) {
  const DType statistics = type == DType::kFloat64 ? type : DType::kFloat32;
  const std::int64_t stride = channels + 3;
  const Array x = random_array(type, rows * stride, 2, 1), residual = random_array(type, rows * channels);
  const Array w = random_array(parameters, channels), b = random_array(parameters, channels);
  for (const bool rms : {false, true}) {
    Array y(type, rows * channels), sum(type, rows * channels), mean(statistics, rows),
        rstd(statistics, rows);
    if (rms) {
      RmsNormParams p = {};
      p.x = x.bytes.data(), p.residual = add ? residual.bytes.data() : nullptr, p.weight = w.bytes.data();
      p.y = y.bytes.data(), p.sum = add ? sum.bytes.data() : nullptr, p.rstd = rstd.bytes.data();
      p.channels = p.residual_stride = p.y_stride = channels, p.x_stride = stride, p.eps = 1e-5;
      p.dtype = type, p.parameter_dtype = parameters;
      cpu_kernels().rms_norm(p, 0, rows);
    } else {
      LayerNormParams p = {};
      p.x = x.bytes.data(), p.residual = add ? residual.bytes.data() : nullptr, p.weight = w.bytes.data();
      p.bias = bias ? b.bytes.data() : nullptr;
      p.y = y.bytes.data(), p.sum = add ? sum.bytes.data() : nullptr;
      p.mean = mean.bytes.data(), p.rstd = rstd.bytes.data();
      p.channels = p.residual_stride = channels, p.x_stride = stride, p.eps = 1e-5;
      p.dtype = type, p.parameter_dtype = parameters;
      cpu_kernels().layer_norm(p, 0, rows);
    }
    const std::string name = rms ? "rms_norm" : "layer_norm";
    for (std::int64_t r = 0; r < rows; ++r) {
      Doubles s(channels);
      double m = 0, squares = 0;
      for (std::int64_t c = 0; c < channels; ++c) {
        const double total = x.values[r * stride + c] + (add ? residual.values[r * channels + c] : 0);
        // One sum of two numbers: as exact in float32 as in double, once rounded to the type.
        s[c] = add && type != DType::kFloat64 ? rounded(type, rounded(DType::kFloat32, total)) : total;
        if (add) expect(name + " sum", sum.at(r * channels + c), s[c], 0);
        m += s[c] / static_cast<double>(channels);
      }
      if (rms) m = 0;
      for (const double v : s) squares += (v - m) * (v - m) / static_cast<double>(channels);
      const double scale = 1 / std::sqrt(squares + 1e-5);
      if (!rms) expect(name + " mean", mean.at(r), m, 8 * unit(statistics) * 4);
      expect(name + " rstd", rstd.at(r), scale, 32 * unit(statistics) * scale);
      for (std::int64_t c = 0; c < channels; ++c) {
        const double want = (s[c] - m) * scale * w.values[c] + (bias && !rms ? b.values[c] : 0);
        const double error = 64 * unit(statistics) * (1 + std::abs(s[c]) * scale);
        expect(name + " y", y.at(r * channels + c), want, error + unit(type) * std::abs(want));
      }
    }
  }
}

}  // namespace

void check_norms() {
  for (const Kind& kind : kKinds) {
    if (kind.type == DType::kInt8) continue;  // of pages only
    for (const std::int64_t channels : {1, 5, 16, 67, 200}) {
      check_norms(kind.type, kind.type, 3, channels, false, true);
      check_norms(kind.type, kind.bytes == 2 ? DType::kFloat32 : kind.type, 2, channels, true, false);
    }
  }
}

}  // namespace minilm::tests
