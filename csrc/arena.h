// The packed weights of a Transformer in one uint8 tensor, the arena, and an int64 tensor with the offsets of
// its parts; minilm/native/blocks.py writes both. All offsets are checked against the sizes of the tensors
// before they become pointers. Performance layer: skip on first reading (as all of csrc/).
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/dispatch.h"
#include "params.h"

namespace minilm {

inline void check_layout(bool ok, const char* what) { STD_TORCH_CHECK(ok, "transformer: ", what); }

// Reads the numbers in order, and the parts of the arena at the offsets that they give.
class Reader {
 public:
  Reader(const torch::stable::Tensor& layout, const torch::stable::Tensor& arena)
      : at_(static_cast<const int64_t*>(layout.const_data_ptr())),
        end_(at_ + layout.size(0)),
        arena_(static_cast<const char*>(arena.const_data_ptr())),
        bytes_(arena.size(0)) {}

  int64_t number(int64_t low, int64_t high) {
    check_layout(at_ < end_, "the layout is too short");
    const int64_t value = *at_++;
    check_layout(value >= low && value <= high, "a number of the layout is out of range");
    return value;
  }
  int64_t size() { return number(1, int64_t{1} << 28); }  // so that products of two do not overflow
  bool flag() { return number(0, 1) != 0; }
  float real() {
    const auto bits = static_cast<uint32_t>(number(0, 0xFFFFFFFF));
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  // `count` float32 numbers, or null for the offset -1.
  const float* floats(int64_t count, bool required) {
    const int64_t place = number(required ? 0 : -1, bytes_);
    if (place < 0) return nullptr;
    check_layout(place % 64 == 0 && place + count * 4 <= bytes_, "a vector lies outside of the arena");
    return reinterpret_cast<const float*>(arena_ + place);
  }
  PackedWeight weight(int64_t in, int64_t columns, bool gated) {
    PackedWeight w = {};
    w.format = static_cast<Format>(number(0, 5));
    w.in = in;
    w.columns = columns;
    w.places = size();
    const auto& kernels = cpu_kernels();
    const int64_t width = kernels.panel * (gated ? 2 : 1);
    check_layout(w.places == (columns + kernels.panel - 1) / kernels.panel * width,
                 "a weight has other panels than it needs");
    const bool grouped = w.format == Format::kQ8 || w.format == Format::kQ4;
    check_layout(!grouped || in % kGroup == 0, "a grouped format needs a multiple of 32 inputs");
    const int64_t place = number(0, bytes_);
    check_layout(place % 64 == 0 && place + kernels.packed_bytes(w.format, in, w.places) <= bytes_,
                 "a weight lies outside of the arena");
    w.packed = arena_ + place;
    return w;
  }
  int64_t left() const { return end_ - at_; }
  bool done() const { return at_ == end_; }

 private:
  const int64_t* at_;
  const int64_t* end_;
  const char* arena_;
  int64_t bytes_;
};

inline void read_layout(Reader& r, TransformerWeights& w, std::vector<BlockWeights>& blocks) {
  w.layers = r.number(0, r.left());  // each takes more than one number
  w.channels = r.size();
  w.heads = r.size();
  w.kv_heads = r.size();
  w.head_dim = r.size();
  w.inner = r.size();
  check_layout(w.heads % w.kv_heads == 0, "the query heads cannot be shared evenly by the key heads");
  check_layout((w.heads + 2 * w.kv_heads) * w.head_dim <= int64_t{1} << 28, "the heads are too many");
  w.activation = static_cast<Activation>(r.number(0, 6));
  w.gated = r.flag();
  w.pre_norm = r.flag();
  w.rms = r.flag();
  w.causal = r.flag();
  w.eps = r.real();
  w.final_norm[0] = r.floats(w.channels, false);
  w.final_norm[1] = r.floats(w.channels, false);
  blocks.resize(w.layers);
  for (auto& block : blocks) {
    block.qkv = r.weight(w.channels, (w.heads + 2 * w.kv_heads) * w.head_dim, false);
    block.out = r.weight(w.heads * w.head_dim, w.channels, false);
    block.up = r.weight(w.channels, w.inner, w.gated);
    block.down = r.weight(w.inner, w.channels, false);
    for (auto* norm : {block.attention_norm, block.mlp_norm}) {
      norm[0] = r.floats(w.channels, true);
      norm[1] = r.floats(w.channels, false);
    }
    block.q_norm = r.floats(w.head_dim, false);
    block.k_norm = r.floats(w.head_dim, false);
    block.window = r.number(0, int64_t{1} << 31);
    block.scale = r.real();
  }
  check_layout(r.done(), "the layout is too long");
  w.blocks = blocks.data();
}

}  // namespace minilm
