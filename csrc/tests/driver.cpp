// Every CPU kernel, in every instruction set that this machine runs, against plain loops in double; without
// torch, so that it can run where there is none: under an emulator, or a sanitizer. Memory is taken from the
// heap in exactly the sizes that the kernels are told.
//
//     driver [instruction set]       prints what was compared; exit status 1 if a result is wrong
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "params.h"

namespace {

using namespace minilm;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

std::string isa;
long compared = 0, wrong = 0;

// |got - want| <= allowed; a NaN is never right.
void expect(const std::string& what, double got, double want, double allowed) {
  ++compared;
  if (std::abs(got - want) <= allowed) return;
  if (++wrong <= 20) std::printf("%s, %s: %.9g, expected %.9g\n", isa.c_str(), what.c_str(), got, want);
}

std::uint32_t state = 1;
std::uint32_t random_bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
int random_below(int n) { return static_cast<int>(random_bits() % static_cast<std::uint32_t>(n)); }
float random_float() { return static_cast<float>(random_bits()) * 0x1p-23f - 1.0f; }
Floats random_floats(std::int64_t count, float scale = 1, float offset = 0) {
  Floats out(count);
  for (float& v : out) v = random_float() * scale + offset;
  return out;
}

// --- numbers of 16, 32 and 64 bits ---

struct Kind {
  DType type;
  std::size_t bytes;
  int bits;  // of the mantissa, with the leading one
  int least_exponent;
};
constexpr Kind kKinds[] = {{DType::kFloat32, 4, 24, -126},
                           {DType::kFloat64, 8, 53, -1022},
                           {DType::kBFloat16, 2, 8, -126},
                           {DType::kFloat16, 2, 11, -14},
                           {DType::kInt8, 1, 8, 7}};  // whole numbers
const Kind& kind_of(DType type) { return kKinds[static_cast<int>(type)]; }
double unit(DType type) { return std::ldexp(1.0, 1 - kind_of(type).bits); }

double rounded(DType type, double x) {
  if (x == 0) return 0;
  const Kind& kind = kind_of(type);
  const int step = std::max(std::ilogb(x), kind.least_exponent) - kind.bits + 1;
  return std::ldexp(std::nearbyint(std::ldexp(x, -step)), step);
}

// What the bytes of a number are, for a number of the type.
void put(DType type, double x, char* to) {
  if (type == DType::kFloat64) {
    std::memcpy(to, &x, 8);
    return;
  }
  if (type == DType::kInt8) {
    *to = static_cast<char>(static_cast<int>(x));
    return;
  }
  const float narrow = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  if (type == DType::kFloat16) {  // a number of it times 2^-112 has its bits where float32 has them
    const float scaled = narrow * 0x1p-112f;
    std::memcpy(&bits, &scaled, 4);
    bits = (bits >> 31 << 15) | ((bits & 0x7FFFFFFF) >> 13);
    std::memcpy(to, &bits, 2);
  } else if (type == DType::kBFloat16) {
    bits >>= 16;
    std::memcpy(to, &bits, 2);
  } else {
    std::memcpy(to, &bits, 4);
  }
}

double get(DType type, const char* from) {
  double wide;
  float narrow;
  std::uint32_t bits = 0;
  switch (type) {
    case DType::kFloat64:
      std::memcpy(&wide, from, 8);
      return wide;
    case DType::kFloat32:
      std::memcpy(&narrow, from, 4);
      return narrow;
    case DType::kInt8:
      return static_cast<signed char>(*from);
    default:
      std::memcpy(&bits, from, 2);
      bits = type == DType::kBFloat16 ? bits << 16 : (bits >> 15 << 31) | ((bits & 0x7FFF) << 13);
      std::memcpy(&narrow, &bits, 4);
      return type == DType::kBFloat16 ? narrow : narrow * 0x1p112;
  }
}

// An array of the type, and what it holds.
struct Array {
  DType type;
  Doubles values;
  std::vector<char> bytes;
  Array(DType type, const Doubles& from)
      : type(type), values(from), bytes(from.size() * kind_of(type).bytes) {
    for (std::size_t i = 0; i < from.size(); ++i) {
      values[i] = rounded(type, from[i]);
      put(type, values[i], bytes.data() + i * kind_of(type).bytes);
    }
  }
  Array(DType type, std::size_t count) : Array(type, Doubles(count)) {}
  double at(std::size_t i) const { return get(type, bytes.data() + i * kind_of(type).bytes); }
};
Array random_array(DType type, std::int64_t count, float scale = 1, float offset = 0) {
  const Floats from = random_floats(count, scale, offset);
  return {type, Doubles(from.begin(), from.end())};
}

// --- norms ---

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

// --- linear layers ---

double activated(Activation activation, double x) {
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
  for (int a = 0; a <= 5; ++a) {
    const auto activation = static_cast<Activation>(a);
    const Floats y = run_linear(w, scaled, activation, false, Floats(x.size()));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double at = static_cast<double>(scaled[i]) * w.values[0];
      expect("activation " + std::to_string(a), y[i], activated(activation, at),
             1e-6 * (1e-3 + std::abs(at)));
    }
  }
}

// --- rope, attention ---

void turn(double* x, const float* cos, const float* sin, std::int64_t size) {
  for (std::int64_t i = 0; i < size / 2; ++i) {
    const double low = x[i], high = x[i + size / 2];
    x[i] = low * cos[i] - high * sin[i];
    x[i + size / 2] = high * cos[i] + low * sin[i];
  }
}

void check_rope(std::int64_t tokens, std::int64_t heads, std::int64_t kv_heads, std::int64_t size, bool norms,
                DType cache) {
  const std::int64_t q_size = heads * size, kv_size = kv_heads * size, stride = q_size + 2 * kv_size + 5;
  Floats rows = random_floats(tokens * stride);
  const Floats before = rows, cos = random_floats(tokens * size / 2), sin = random_floats(tokens * size / 2);
  const Floats norm = random_floats(size);
  Array keys(cache, (tokens + 4) * kv_size), values(cache, (tokens + 4) * kv_size);
  Floats k_scales((tokens + 4) * kv_heads), v_scales((tokens + 4) * kv_heads);
  std::vector<std::int64_t> slots;
  for (std::int64_t t = 0; t < tokens; ++t) slots.push_back(tokens + 2 - t);
  RopeParams p = {};
  p.q = rows.data(), p.k = p.q + q_size, p.v = p.k + kv_size, p.cos = cos.data(), p.sin = sin.data();
  p.q_norm = norms ? norm.data() : nullptr, p.k_norm = p.q_norm, p.eps = 1e-6f;
  p.k_pages = keys.bytes.data(), p.v_pages = values.bytes.data(), p.slots = slots.data();
  p.k_scales = k_scales.data(), p.v_scales = v_scales.data();
  p.stride = stride, p.heads = heads, p.kv_heads = kv_heads, p.head_dim = size, p.cache_dtype = cache;
  cpu_kernels().rope(p, 0, tokens);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float* row = rows.data() + t * stride;
    for (std::int64_t head = 0; head < heads + kv_heads; ++head) {
      Doubles x(before.begin() + t * stride + head * size, before.begin() + t * stride + (head + 1) * size);
      if (norms) {
        double squares = 0;
        for (const double v : x) squares += v * v / static_cast<double>(size);
        for (std::int64_t i = 0; i < size; ++i) x[i] *= norm[i] / std::sqrt(squares + 1e-6);
      }
      turn(x.data(), cos.data() + t * size / 2, sin.data() + t * size / 2, size);
      for (std::int64_t i = 0; i < size; ++i) expect("rope", row[head * size + i], x[i], 1e-5);
    }
    for (std::int64_t i = 0; i < kv_size; ++i) {
      const std::int64_t at = slots[t] * kv_size + i;
      const float *key = row + q_size, *value = key + kv_size;
      if (cache != DType::kInt8) {
        expect("appended key", keys.at(at), rounded(cache, key[i]), 0);
        expect("appended value", values.at(at), rounded(cache, value[i]), 0);
        continue;
      }
      const auto scale_of = [&](const float* x) {
        float largest = 0;
        for (std::int64_t j = i / size * size; j < i / size * size + size; ++j) {
          largest = std::max(largest, std::abs(x[j]));
        }
        return largest / 127.0f;
      };
      const std::int64_t scale_at = slots[t] * kv_heads + i / size;
      expect("scale of a key", k_scales[scale_at], scale_of(key), 0);
      expect("scale of a value", v_scales[scale_at], scale_of(value), 0);
      expect("code of a key", keys.at(at), std::nearbyint(key[i] / scale_of(key)), 0);
      expect("code of a value", values.at(at), std::nearbyint(value[i] / scale_of(value)), 0);
    }
    expect("what lies beyond a row", row[stride - 1], before[t * stride + stride - 1], 0);
  }
}

// A batch, with its keys and values as rows and in the pages of a cache.
struct Batch {
  std::vector<std::int32_t> queries, keys;  // of each sequence
  std::int64_t heads, kv_heads, size;
};

// Whether pairs of bfloat16 are multiplied.
bool has_pairs() { return cpu_kernels().prepared_row_bytes(Format::kBFloat16, 2) > 0; }

// softmax(scale q k^T) v in double, for one query; `seen(key)` tells which keys count. With `pairs` what is
// multiplied is rounded to bfloat16: q after scaling, and probabilities before they are divided by their sum.
template <typename Seen, typename At>
Doubles attended(const float* q, std::int64_t keys, std::int64_t size, float scale, Seen seen, At at,
                 bool pairs) {
  const auto half = [&](double x) { return pairs ? rounded(DType::kBFloat16, x) : x; };
  constexpr float kLog2E = 1.44269504088896341f;
  Doubles scores, out(size);
  double top = -INFINITY, total = 0;
  for (std::int64_t key = 0; key < keys; ++key) {
    double score = 0;
    for (std::int64_t i = 0; i < size; ++i) score += half(q[i] * (scale * kLog2E)) * half(at(false, key, i));
    scores.push_back(seen(key) ? score : -INFINITY);
    top = std::max(top, scores.back());
  }
  for (double& score : scores) total += score = std::exp2(score - top);
  for (std::int64_t key = 0; key < keys; ++key) {
    for (std::int64_t i = 0; i < size; ++i) out[i] += half(scores[key]) / total * half(at(true, key, i));
  }
  return out;
}

void check_attention(const Batch& b, bool causal, std::int64_t window, bool paged, DType cache, bool pairs) {
  const std::int64_t sequences = static_cast<std::int64_t>(b.queries.size()), page_size = 4;
  std::vector<std::int32_t> cu_q = {0}, cu_k = {0};
  std::int32_t longest = 0;
  for (std::int64_t s = 0; s < sequences; ++s) {
    cu_q.push_back(cu_q.back() + b.queries[s]);
    cu_k.push_back(cu_k.back() + b.keys[s]);
    longest = std::max(longest, b.keys[s]);
  }
  const std::int64_t kv_size = b.kv_heads * b.size, width = (longest + page_size - 1) / page_size;
  const std::int64_t pages = width * sequences;
  const Floats q = random_floats(cu_q.back() * b.heads * b.size, 2);
  const DType type = paged ? cache : DType::kFloat32;
  const std::int64_t slots = paged ? pages * page_size : cu_k.back();
  const float most = type == DType::kInt8 ? 50.0f : 1.0f;
  const Array k = random_array(type, slots * kv_size, 2 * most),
              v = random_array(type, slots * kv_size, most);
  Floats k_scales = random_floats(slots * b.kv_heads, 0.02f),
         v_scales = random_floats(slots * b.kv_heads, 0.02f);
  std::vector<std::int32_t> table;  // pages in no order
  for (std::int64_t i = 0; i < pages; ++i) table.push_back(static_cast<std::int32_t>((pages - 1 - i)));
  Floats out(q.size());
  AttentionParams p = {};
  p.q = q.data(), p.k = k.bytes.data(), p.v = v.bytes.data(), p.out = out.data(), p.cu_q = cu_q.data();
  p.q_stride = b.heads * b.size, p.kv_stride = kv_size, p.heads = b.heads, p.kv_heads = b.kv_heads;
  p.head_dim = b.size, p.window = window, p.scale = 0.3f, p.causal = causal, p.cache_dtype = cache;
  p.pairs = pairs;
  if (type == DType::kInt8) p.k_scales = k_scales.data(), p.v_scales = v_scales.data();
  if (paged) {
    p.block_table = table.data(), p.context = b.keys.data(), p.table_width = width, p.page_size = page_size;
  } else {
    p.cu_k = cu_k.data();
  }
  Floats scratch(cpu_kernels().attention_scratch(p, longest));
  for (std::int64_t s = 0; s < sequences; ++s) {
    for (std::int64_t head = 0; head < b.heads; ++head) cpu_kernels().attention(p, s, head, scratch.data());
  }
  for (std::int64_t s = 0; s < sequences; ++s) {
    for (std::int64_t query = 0; query < b.queries[s]; ++query) {
      const std::int64_t place = query + b.keys[s] - b.queries[s];
      for (std::int64_t head = 0; head < b.heads; ++head) {
        const std::int64_t from = ((cu_q[s] + query) * b.heads + head) * b.size;
        const auto seen = [&](std::int64_t key) {
          return (!causal || key <= place) && (window == 0 || std::abs(key - place) < window);
        };
        const auto at = [&](bool value, std::int64_t key, std::int64_t i) {
          const std::int64_t slot =
              paged ? table[s * width + key / page_size] * page_size + key % page_size : cu_k[s] + key;
          const std::int64_t kv_head = head / (b.heads / b.kv_heads);
          const float scale =
              type == DType::kInt8 ? (value ? v_scales : k_scales)[slot * b.kv_heads + kv_head] : 1.0f;
          return scale * (value ? v : k).values[slot * kv_size + kv_head * b.size + i];
        };
        const bool rounds = pairs && has_pairs();
        const Doubles want = attended(q.data() + from, b.keys[s], b.size, 0.3f, seen, at, rounds);
        // A probability near the middle between two of bfloat16 may be rounded to the other of them.
        const double allowed = rounds ? 1.0 / 256 : 2e-6;
        for (std::int64_t i = 0; i < b.size; ++i) {
          expect(paged ? "attention in pages" : "attention", out[from + i], want[i],
                 allowed * (1 + std::abs(want[i])));
        }
      }
    }
  }
}

// --- all blocks in one call ---

struct Model {
  bool decoder;  // before-norms, RMSNorm, rope, a gated MLP, causal; else as BERT
  std::int64_t channels = 24, heads = 4, kv_heads, size = 6, inner = 40, layers = 2;
  std::vector<Weight> linear;  // qkv, out, up, down of each layer
  Weight head;                 // logits of 37 tokens
  std::vector<Floats> norms;   // weight and bias of both norms of each layer
  std::vector<BlockWeights> blocks;
  TransformerWeights weights = {};

  Model(bool decoder, Format format, Format head_format)
      : decoder(decoder), kv_heads(decoder ? 2 : 4), head(head_format, 37, channels, false, false) {
    const std::int64_t all = (heads + 2 * kv_heads) * size;
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      linear.emplace_back(format, all, channels, false, !decoder);
      linear.emplace_back(format, channels, heads * size, false, !decoder);
      linear.emplace_back(format, decoder ? 2 * inner : inner, channels, decoder, !decoder);
      linear.emplace_back(format, channels, inner, false, !decoder);
      for (int i = 0; i < 4; ++i) norms.push_back(random_floats(channels, 0.5f, i % 2 ? 0.0f : 1.0f));
    }
    norms.push_back(random_floats(channels, 0.5f, 1));
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      const auto packed = [&](std::int64_t i) {
        const Weight& w = linear[4 * layer + i];
        return PackedWeight{w.packed.data(), w.format, w.in, w.places, w.columns};
      };
      const auto norm = [&](std::int64_t i) { return norms[4 * layer + i].data(); };
      BlockWeights block = {};
      block.qkv = packed(0), block.out = packed(1), block.up = packed(2), block.down = packed(3);
      block.attention_norm[0] = norm(0), block.attention_norm[1] = decoder ? nullptr : norm(1);
      block.mlp_norm[0] = norm(2), block.mlp_norm[1] = decoder ? nullptr : norm(3);
      block.scale = 0.4f;
      blocks.push_back(block);
    }
    weights.blocks = blocks.data(), weights.final_norm[0] = decoder ? norms.back().data() : nullptr;
    weights.layers = layers, weights.channels = channels, weights.heads = heads, weights.kv_heads = kv_heads;
    weights.head_dim = size, weights.inner = inner, weights.eps = 1e-5f;
    weights.activation = decoder ? Activation::kSilu : Activation::kGelu;
    weights.gated = weights.pre_norm = weights.rms = weights.causal = decoder;
  }

  // A number near the middle between two of bfloat16 may be rounded to the other of them.
  double tolerance() const { return linear[0].rounds() ? 1e-2 : 1e-4; }

  void angles(std::int64_t place, Floats& cos, Floats& sin) const {
    for (std::int64_t i = 0; i < size / 2; ++i) {
      cos.push_back(std::cos(static_cast<float>(place) / static_cast<float>(i + 1)));
      sin.push_back(std::sin(static_cast<float>(place) / static_cast<float>(i + 1)));
    }
  }

  void norm(Floats& x, const float* weight, const float* bias) const {
    for (std::size_t first = 0; first < x.size(); first += channels) {
      double mean = 0, squares = 0;
      const double n = static_cast<double>(channels);
      for (std::int64_t c = 0; c < channels && !decoder; ++c) mean += x[first + c] / n;
      for (std::int64_t c = 0; c < channels; ++c)
        squares += (x[first + c] - mean) * (x[first + c] - mean) / n;
      for (std::int64_t c = 0; c < channels; ++c) {
        const double y = (x[first + c] - mean) / std::sqrt(squares + 1e-5) * weight[c];
        x[first + c] = static_cast<float>(y + (bias != nullptr ? bias[c] : 0));
      }
    }
  }

  // One whole sequence, x [n, C].
  Floats forward(Floats x) const {
    const std::int64_t n = static_cast<std::int64_t>(x.size()) / channels,
                       all = (heads + 2 * kv_heads) * size;
    const auto add = [&](Floats& to, const Doubles& y) {
      for (std::size_t i = 0; i < to.size(); ++i) to[i] += static_cast<float>(y[i]);
    };
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      const BlockWeights& block = blocks[layer];
      const Weight* w = &linear[4 * layer];
      Floats h = x;
      if (decoder) norm(h, block.attention_norm[0], nullptr);
      Doubles qkv = w[0].times(h, Activation::kNone);
      for (std::int64_t t = 0; t < n && decoder; ++t) {
        Floats cos, sin;
        angles(t, cos, sin);
        for (std::int64_t head = 0; head < heads + kv_heads; ++head) {
          turn(&qkv[t * all + head * size], cos.data(), sin.data(), size);
        }
      }
      Floats mixed(n * heads * size);
      for (std::int64_t t = 0; t < n; ++t) {
        for (std::int64_t head = 0; head < heads; ++head) {
          const double* from = &qkv[t * all + head * size];
          const Floats q(from, from + size);
          const auto at = [&](bool value, std::int64_t key, std::int64_t i) {
            return qkv[key * all + (heads + (value ? kv_heads : 0) + head / (heads / kv_heads)) * size + i];
          };
          const auto seen = [&](std::int64_t key) { return !decoder || key <= t; };
          const Doubles out = attended(q.data(), n, size, 0.4f, seen, at, w[0].rounds());
          for (std::int64_t i = 0; i < size; ++i) {
            mixed[(t * heads + head) * size + i] = static_cast<float>(out[i]);
          }
        }
      }
      add(x, w[1].times(mixed, Activation::kNone));
      if (!decoder) norm(x, block.attention_norm[0], block.attention_norm[1]);
      h = x;
      if (decoder) norm(h, block.mlp_norm[0], nullptr);
      const Doubles mid = w[2].times(h, weights.activation);
      add(x, w[3].times(Floats(mid.begin(), mid.end()), Activation::kNone));
      if (!decoder) norm(x, block.mlp_norm[0], block.mlp_norm[1]);
    }
    if (decoder) norm(x, norms.back().data(), nullptr);
    return x;
  }
};

// The sequences `lengths`, passed through the model in pieces: in one, or as a prompt, some tokens more, and
// one token more; with so many threads.
void check_transformer(const Model& m, const std::vector<std::int64_t>& lengths, bool in_pieces,
                       int threads) {
  const std::int64_t sequences = static_cast<std::int64_t>(lengths.size()), page_size = 4;
  const std::int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  const std::int64_t width = (longest + page_size - 1) / page_size;
  const std::int64_t layer_size = sequences * width * page_size * m.kv_heads * m.size;
  std::vector<Floats> x, want;
  for (const std::int64_t length : lengths) {
    x.push_back(random_floats(length * m.channels));
    want.push_back(m.forward(x.back()));
  }
  std::vector<std::int32_t> table;
  for (std::int64_t i = 0; i < sequences * width; ++i) table.push_back(static_cast<std::int32_t>(i ^ 1));
  if (sequences * width % 2) table.back() = static_cast<std::int32_t>(sequences * width - 1);
  Floats k_pages(layer_size * m.layers), v_pages(layer_size * m.layers);
  std::vector<std::int64_t> done(sequences, 0);
  for (int step = in_pieces ? 0 : 3; step < 4; ++step) {
    std::vector<std::int32_t> ends = {0}, context;
    std::vector<std::int64_t> slots;
    Floats rows, cos, sin;
    std::int64_t most = 0;
    bool fresh = true, one_each = true;
    for (std::int64_t s = 0; s < sequences; ++s) {
      const std::int64_t left = lengths[s] - done[s];
      const std::int64_t count = step == 3 ? left : step == 2 ? 1 : step == 1 ? 2 : left - 5;
      fresh = fresh && done[s] == 0;
      for (std::int64_t t = done[s]; t < done[s] + count; ++t) {
        rows.insert(rows.end(), x[s].begin() + t * m.channels, x[s].begin() + (t + 1) * m.channels);
        slots.push_back(table[s * width + t / page_size] * page_size + t % page_size);
        m.angles(t, cos, sin);
      }
      one_each = one_each && count == 1;
      ends.push_back(ends.back() + static_cast<std::int32_t>(count));
      context.push_back(static_cast<std::int32_t>(done[s] + count));
      most = std::max<std::int64_t>(most, context.back());
    }
    TransformerParams p = {};
    p.weights = &m.weights, p.x = rows.data(), p.cu_seqlens = ends.data();
    p.tokens = ends.back(), p.sequences = sequences, p.max_keys = most, p.threads = threads;
    p.fresh = fresh, p.one_each = !fresh && one_each, p.cache_dtype = DType::kFloat32;
    if (m.decoder) p.cos = cos.data(), p.sin = sin.data();
    if (m.decoder) {
      p.k_pages = reinterpret_cast<char*>(k_pages.data()),
      p.v_pages = reinterpret_cast<char*>(v_pages.data());
      p.slots = slots.data(), p.block_table = table.data(), p.context_lens = context.data();
      p.layer_bytes = layer_size * 4, p.table_width = width, p.page_size = page_size;
    }
    const PackedWeight head = {m.head.packed.data(), m.head.format, m.head.in, m.head.places, m.head.columns};
    Floats logits(p.one_each ? p.tokens * m.head.columns : 0);
    std::vector<std::int64_t> best(p.one_each ? p.tokens : 0);
    if (p.one_each && sequences < 48) p.head = &head, p.logits = logits.data(), p.best = best.data();
    std::vector<char> workspace(cpu_kernels().transformer_workspace(p) + 64);
    p.workspace = workspace.data() + (64 - reinterpret_cast<std::uintptr_t>(workspace.data()) % 64) % 64;
    std::vector<std::thread> team;
    for (int i = 0; i < threads; ++i) team.emplace_back([&] { cpu_kernels().transformer(p); });
    for (std::thread& thread : team) thread.join();
    if (p.head != nullptr) {
      const Doubles scores = m.head.times(rows, Activation::kNone);
      for (std::size_t i = 0; i < logits.size(); ++i) expect("logits", logits[i], scores[i], 1e-4);
      for (std::size_t row = 0; row < best.size(); ++row) {
        const auto first = logits.begin() + row * m.head.columns;
        const auto highest = std::max_element(first, first + m.head.columns);  // the first of them
        expect("best", static_cast<double>(best[row]), static_cast<double>(highest - first), 0);
      }
    }
    for (std::int64_t s = 0; s < sequences; ++s) {
      for (std::int64_t i = 0; i < (ends[s + 1] - ends[s]) * m.channels; ++i) {
        const double expected = want[s][done[s] * m.channels + i];
        expect(m.decoder ? "decoder" : "encoder", rows[ends[s] * m.channels + i], expected, m.tolerance());
      }
      done[s] = context[s];
    }
  }
}

void check_all() {
  for (const Kind& kind : kKinds) {
    if (kind.type == DType::kInt8) continue;  // of pages only
    for (const std::int64_t channels : {1, 5, 16, 67, 200}) {
      check_norms(kind.type, kind.type, 3, channels, false, true);
      check_norms(kind.type, kind.bytes == 2 ? DType::kFloat32 : kind.type, 2, channels, true, false);
    }
  }
  for (const Format format : kFormats) {
    const bool grouped = format == Format::kQ8 || format == Format::kQ4;
    for (const std::int64_t in : {32, 96, 7, 45}) {
      if (grouped && in % kGroup != 0) continue;
      for (const std::int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 26}) {
        const auto activation = static_cast<Activation>(rows % 6);
        check_linear(format, rows, 37, in, activation, rows % 2 == 1 && rows > 2, rows % 4 == 2);
      }
    }
    check_linear(format, 3, 1, 32, Activation::kNone, false, false);
    check_linear(format, 2, 130, 512, Activation::kSilu, true, false);
  }
  check_activations();
  for (const DType cache : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt8}) {
    check_rope(5, 3, 1, 8, false, cache);
    check_rope(4, 4, 2, 22, true, cache);
    for (const Batch& b : {Batch{{3, 1, 7}, {3, 1, 7}, 4, 2, 8}, Batch{{1, 2, 15}, {33, 2, 40}, 6, 2, 20},
                           Batch{{1, 1}, {1, 300}, 3, 3, 32}, Batch{{14}, {14}, 2, 1, 64}}) {
      for (const bool causal : {false, true}) {
        for (const std::int64_t window : {0, 3}) {
          for (const bool pairs : {false, true}) {
            check_attention(b, causal, window, true, cache, pairs);
            if (cache == DType::kFloat32) check_attention(b, causal, window, false, cache, pairs);
          }
        }
      }
    }
  }
  const Model encoder(false, Format::kFloat32, Format::kFloat32),
      decoder(true, Format::kFloat32, Format::kFloat32),
      quantised_head(true, Format::kFloat32, Format::kInt8),
      half_encoder(false, Format::kBFloat16, Format::kBFloat16),
      half_decoder(true, Format::kBFloat16, Format::kBFloat16);
  std::vector<std::int64_t> short_ones(60);
  for (int i = 0; i < 60; ++i) short_ones[i] = 6 + 7 * i % 36;
  for (const int threads : {1, 2, 3}) {
    check_transformer(encoder, short_ones, false, threads);
    check_transformer(decoder, short_ones, true, threads);
    check_transformer(encoder, {5, 1, 9}, false, threads);
    check_transformer(encoder, {60, 3, 90, 8}, false, threads);
    check_transformer(decoder, {9, 6, 20}, true, threads);
    check_transformer(decoder, {300, 7}, true, threads);
    check_transformer(quantised_head, {9, 6, 20, 11, 7}, true, threads);
    check_transformer(quantised_head, {9, 6}, true, threads);
    check_transformer(half_encoder, {60, 3, 90, 8}, false, threads);
    check_transformer(half_decoder, {9, 6, 20}, true, threads);
    check_transformer(decoder, std::vector<std::int64_t>(50 * threads, 7), true, threads);
  }
}

}  // namespace

int main(int count, char** arguments) {
  for (const std::string& name : runnable_isas()) {
    if (count > 1 && name != arguments[1]) continue;
    select_isa(isa = name);
    state = 1;
    compared = 0;
    check_all();
    std::printf("%s: %ld numbers compared\n", name.c_str(), compared);
  }
  std::printf(wrong ? "%ld are wrong\n" : "all are right\n", wrong);
  return wrong != 0 || compared == 0;
}
