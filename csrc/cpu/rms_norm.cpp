// RMSNorm over rows of C channels, with an optional residual added before it (Zhang and Sennrich 2019,
// arXiv:1910.07467).
//
//   s = x + residual                             rounded to the data's type, as it is returned
//   y = round(s / sqrt(sum(s s) / C + eps)) * weight      rounded before the weight too, as Llama does
//
// Arithmetic in float32 (float64 for float64 data). One row at a time in two passes, the second of which
// finds the row in the first-level cache. A row belongs to one thread, and the order of its sum depends on C
// and the vector width alone. Memory traffic: 2 C b a row, with residual 4 C b; about 6 operations an
// element.

#include "cpu/rows.h"
#include "params.h"

namespace minilm::MINILM_ISA {
namespace {

template <typename T, typename W>
void rows(const RmsNormParams& p, std::int64_t begin, std::int64_t end) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const std::int64_t channels = p.channels;
  const W* weight = static_cast<const W*>(p.weight);
  for (std::int64_t row = begin; row < end; ++row) {
    const T* s = static_cast<const T*>(p.x) + row * p.x_stride;
    T* y = static_cast<T*>(p.y) + row * p.y_stride;
    V squares[4] = {};
    if (p.residual != nullptr) {
      const T* x = s;
      const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
      T* sum = static_cast<T*>(p.sum) + row * channels;
      for_each_vector<A>(channels, [&](std::int64_t i, int n, int k) {
        const Raw<T> raw = Storage<T>::round(read(x + i, n) + read(residual + i, n));
        write(sum + i, raw, n);
        const V value = Storage<T>::widen(raw);
        squares[k] += value * value;
      });
      s = sum;
    } else {
      for_each_vector<A>(channels, [&](std::int64_t i, int n, int k) {
        const V value = read(s + i, n);
        squares[k] += value * value;
      });
    }
    const A mean =
        sum_lanes<A>((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<A>(channels);
    const A rstd = A(1) / square_root(mean + static_cast<A>(p.eps));
    for_each_vector<A>(channels, [&](std::int64_t i, int n, int) {
      const V scaled = Storage<T>::widen(Storage<T>::round(read(s + i, n) * rstd));
      write(y + i, Storage<T>::round(scaled * read(weight + i, n)), n);
    });
    if (p.rstd != nullptr) static_cast<A*>(p.rstd)[row] = rstd;
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, std::int64_t begin, std::int64_t end) {
  const bool wide = p.parameter_dtype != p.dtype;  // float32 parameters of 16-bit data
  switch (p.dtype) {
    case DType::kFloat32:
      return rows<float, float>(p, begin, end);
    case DType::kFloat64:
      return rows<double, double>(p, begin, end);
    case DType::kBFloat16:
      return wide ? rows<BFloat16, float>(p, begin, end) : rows<BFloat16, BFloat16>(p, begin, end);
    case DType::kFloat16:
      return wide ? rows<Float16, float>(p, begin, end) : rows<Float16, Float16>(p, begin, end);
    case DType::kInt8:
      return;  // of pages only
  }
}

}  // namespace minilm::MINILM_ISA
