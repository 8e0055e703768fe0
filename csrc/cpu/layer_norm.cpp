// LayerNorm over rows of C channels, with an optional residual added before it (Ba et al. 2016,
// arXiv:1607.06450).
//
//   s = x + residual         rounded to the data's type: y is the norm of exactly the sum that is returned
//   m = sum(s) / C           a first estimate of the mean
//   d = s - m                nearly exact, however far from zero the mean is
//   e = sum(d) / C           the rounding error of m
//   v = sum(d d) / C - e e   the (biased) variance
//   y = (d - e) / sqrt(v + eps) * weight + bias;  mean = m + e;  rstd = 1 / sqrt(v + eps)
//
// The mean is corrected before it is used, so a large mean does not increase the error of y beyond that from
// the rounding of the inputs. All arithmetic is in float32 (float64 for float64 data) and is rounded once, at
// the store.
//
// Layout: one row at a time in three passes; all passes except the first find the row in the first-level
// cache (up to 8,192 float32 channels in 32 KiB). One thread processes a row, and the order of its sums
// depends only on C and the vector width: a row's result is bit-identical in any batch and with any number of
// threads.
//
// Memory traffic: 2 C b per row (b bytes per element), with residual 4 C b: x, residual -> sum, y. About 12
// operations per element for 16 bytes, so memory is the limit if the data is not in the caches.

#include "cpu/rows.h"
#include "params.h"

namespace minilm::MINILM_ISA {
namespace {

// T: data, W: parameters.
template <typename T, typename W>
void rows(const LayerNormParams& p, std::int64_t begin, std::int64_t end) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const std::int64_t channels = p.channels;
  const A scale = A(1) / static_cast<A>(channels);
  const A eps = static_cast<A>(p.eps);
  const W* weight = static_cast<const W*>(p.weight);
  const W* bias = static_cast<const W*>(p.bias);

  for (std::int64_t row = begin; row < end; ++row) {
    const T* s = static_cast<const T*>(p.x) + row * p.x_stride;
    T* y = static_cast<T*>(p.y) + row * channels;

    V total[4] = {};
    if (p.residual != nullptr) {
      const T* x = s;
      const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
      T* sum = static_cast<T*>(p.sum) + row * channels;
      for_each_vector<A>(channels, [&](std::int64_t i, int n, int k) {
        const Raw<T> raw = Storage<T>::round(read(x + i, n) + read(residual + i, n));
        write(sum + i, raw, n);
        total[k] += Storage<T>::widen(raw);
      });
      s = sum;
    } else {
      for_each_vector<A>(channels, [&](std::int64_t i, int n, int k) { total[k] += read(s + i, n); });
    }
    const A m = sum_lanes<A>((total[0] + total[1]) + (total[2] + total[3])) * scale;

    V left[4] = {};
    V squares[4] = {};
    for_each_vector<A>(channels, [&](std::int64_t i, int n, int k) {
      V d = read(s + i, n) - m;
      if (n != kLanes<A>) d = keep<A>(d, n);
      left[k] += d;
      squares[k] += d * d;
    });
    const A e = sum_lanes<A>((left[0] + left[1]) + (left[2] + left[3])) * scale;
    const A raw_variance =
        sum_lanes<A>((squares[0] + squares[1]) + (squares[2] + squares[3])) * scale - e * e;
    const A variance = raw_variance < 0 ? A(0) : raw_variance;  // a NaN passes
    const A rstd = A(1) / square_root(variance + eps);
    const A shift = -e * rstd;

    for_each_vector<A>(channels, [&](std::int64_t i, int n, int) {
      V out = ((read(s + i, n) - m) * rstd + shift) * read(weight + i, n);
      if (bias != nullptr) out += read(bias + i, n);
      write(y + i, Storage<T>::round(out), n);
    });
    static_cast<A*>(p.mean)[row] = m + e;
    static_cast<A*>(p.rstd)[row] = rstd;
  }
}

}  // namespace

void layer_norm(const LayerNormParams& p, std::int64_t begin, std::int64_t end) {
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
