// The packed weights of a Transformer in one uint8 tensor, the arena, and an int64 tensor with the offsets of
// its parts; minilm/native/arena.py writes both. All offsets are checked against the sizes of the tensors
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

// The numbers of the layout: a header, then as many for each layer. minilm/native/arena.py has the same names
// in the same order. A place (..At, and of vectors) is an offset in bytes, -1 for a vector that there is not.
enum class Header : int64_t {
  kLayers,
  kChannels,
  kHeads,
  kKvHeads,
  kHeadDim,
  kRotated,
  kInner,
  kActivation,
  kGated,
  kRms,
  kCausal,
  kParallel,
  kQkNormOfAll,
  kEps,
  kSoftCap,
  kFinalNormWeight,
  kFinalNormBias,
  kCount
};
enum class Layer : int64_t {
  kQkvFormat,
  kQkvPlaces,
  kQkvAt,
  kOutFormat,
  kOutPlaces,
  kOutAt,
  kUpFormat,
  kUpPlaces,
  kUpAt,
  kDownFormat,
  kDownPlaces,
  kDownAt,
  kAttentionReadWeight,
  kAttentionReadBias,
  kAttentionAddedWeight,
  kAttentionAddedBias,
  kAttentionSumWeight,
  kAttentionSumBias,
  kMlpReadWeight,
  kMlpReadBias,
  kMlpAddedWeight,
  kMlpAddedBias,
  kMlpSumWeight,
  kMlpSumBias,
  kQNorm,
  kKNorm,
  kWindow,
  kScale,
  kTurns,
  kCount
};

// Reads the numbers by name, and the parts of the arena at the offsets that they give.
class Reader {
 public:
  Reader(const torch::stable::Tensor& layout, const torch::stable::Tensor& arena)
      : at_(static_cast<const int64_t*>(layout.const_data_ptr())),
        count_(layout.size(0)),
        arena_(static_cast<const char*>(arena.const_data_ptr())),
        bytes_(arena.size(0)) {
    check_layout(count_ >= kHeader, "the layout is too short");
    const int64_t layers = number(Header::kLayers, 0, count_);
    check_layout(count_ >= kHeader + layers * kLayer, "the layout is too short");
    check_layout(count_ == kHeader + layers * kLayer, "the layout is too long");
  }

  // The numbers that are read from now on are those of this layer.
  void enter(int64_t layer) { of_layer_ = at_ + kHeader + layer * kLayer; }

  template <typename Field>
  int64_t number(Field field, int64_t low, int64_t high) const {
    const int64_t value = get(field);
    check_layout(value >= low && value <= high, "a number of the layout is out of range");
    return value;
  }
  // So that products of two do not overflow.
  template <typename Field>
  int64_t size(Field field) const {
    return number(field, 1, int64_t{1} << 28);
  }
  bool flag(Header field) const { return number(field, 0, 1) != 0; }
  template <typename Field>
  float real(Field field) const {
    const auto bits = static_cast<uint32_t>(number(field, 0, 0xFFFFFFFF));
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  // `count` float32 numbers, or null.
  template <typename Field>
  const float* floats(Field field, int64_t count) const {
    const int64_t place = number(field, -1, bytes_);
    if (place < 0) return nullptr;
    check_layout(place % 64 == 0 && place + count * 4 <= bytes_, "a vector lies outside of the arena");
    return reinterpret_cast<const float*>(arena_ + place);
  }
  // A norm; the bias stands behind its weight.
  template <typename Field>
  void norm(Field weight, int64_t count, Norm& to) const {
    to[0] = floats(weight, count);
    to[1] = floats(after(weight, 1), count);
  }
  // A weight, whose places and offset stand behind its format.
  PackedWeight weight(Layer format, int64_t in, int64_t columns, bool gated) const {
    PackedWeight w = {};
    w.format = static_cast<Format>(number(format, 0, 5));
    w.in = in;
    w.columns = columns;
    w.places = size(after(format, 1));
    const auto& kernels = cpu_kernels();
    const int64_t width = kernels.panel * (gated ? 2 : 1);
    check_layout(w.places == (columns + kernels.panel - 1) / kernels.panel * width,
                 "a weight has other panels than it needs");
    const bool grouped = w.format == Format::kQ8 || w.format == Format::kQ4;
    check_layout(!grouped || in % kGroup == 0, "a grouped format needs a multiple of 32 inputs");
    const int64_t place = number(after(format, 2), 0, bytes_);
    check_layout(place % 64 == 0 && place + kernels.packed_bytes(w.format, in, w.places) <= bytes_,
                 "a weight lies outside of the arena");
    w.packed = arena_ + place;
    return w;
  }

 private:
  static constexpr auto kHeader = static_cast<int64_t>(Header::kCount);
  static constexpr auto kLayer = static_cast<int64_t>(Layer::kCount);

  template <typename Field>
  static Field after(Field field, int64_t by) {
    return static_cast<Field>(static_cast<int64_t>(field) + by);
  }
  int64_t get(Header field) const { return at_[static_cast<int64_t>(field)]; }
  int64_t get(Layer field) const { return of_layer_[static_cast<int64_t>(field)]; }

  const int64_t* at_;
  const int64_t* of_layer_ = nullptr;
  int64_t count_;
  const char* arena_;
  int64_t bytes_;
};

inline void read_layout(Reader& r, TransformerWeights& w, std::vector<BlockWeights>& blocks) {
  w.layers = r.number(Header::kLayers, 0, int64_t{1} << 28);
  w.channels = r.size(Header::kChannels);
  w.heads = r.size(Header::kHeads);
  w.kv_heads = r.size(Header::kKvHeads);
  w.head_dim = r.size(Header::kHeadDim);
  w.rotated = r.number(Header::kRotated, 1, w.head_dim);
  w.inner = r.size(Header::kInner);
  check_layout(w.heads % w.kv_heads == 0, "the query heads cannot be shared evenly by the key heads");
  check_layout((w.heads + 2 * w.kv_heads) * w.head_dim <= int64_t{1} << 28, "the heads are too many");
  w.activation = static_cast<Activation>(r.number(Header::kActivation, 0, 6));
  w.gated = r.flag(Header::kGated);
  w.rms = r.flag(Header::kRms);
  w.causal = r.flag(Header::kCausal);
  w.parallel = r.flag(Header::kParallel);
  w.qk_norm_of_all = r.flag(Header::kQkNormOfAll);
  w.eps = r.real(Header::kEps);
  w.soft_cap = r.real(Header::kSoftCap);
  r.norm(Header::kFinalNormWeight, w.channels, w.final_norm);
  const int64_t q_norm = w.qk_norm_of_all ? w.heads * w.head_dim : w.head_dim;
  const int64_t k_norm = w.qk_norm_of_all ? w.kv_heads * w.head_dim : w.head_dim;
  blocks.resize(w.layers);
  for (int64_t layer = 0; layer < w.layers; ++layer) {
    r.enter(layer);
    BlockWeights& block = blocks[layer];
    block.qkv = r.weight(Layer::kQkvFormat, w.channels, (w.heads + 2 * w.kv_heads) * w.head_dim, false);
    block.out = r.weight(Layer::kOutFormat, w.heads * w.head_dim, w.channels, false);
    block.up = r.weight(Layer::kUpFormat, w.channels, w.inner, w.gated);
    block.down = r.weight(Layer::kDownFormat, w.inner, w.channels, false);
    r.norm(Layer::kAttentionReadWeight, w.channels, block.attention.read);
    r.norm(Layer::kAttentionAddedWeight, w.channels, block.attention.added);
    r.norm(Layer::kAttentionSumWeight, w.channels, block.attention.sum);
    r.norm(Layer::kMlpReadWeight, w.channels, block.mlp.read);
    r.norm(Layer::kMlpAddedWeight, w.channels, block.mlp.added);
    r.norm(Layer::kMlpSumWeight, w.channels, block.mlp.sum);
    block.q_norm = r.floats(Layer::kQNorm, q_norm);
    block.k_norm = r.floats(Layer::kKNorm, k_norm);
    block.window = r.number(Layer::kWindow, 0, int64_t{1} << 31);
    block.scale = r.real(Layer::kScale);
    block.turns = static_cast<Turns>(r.number(Layer::kTurns, 0, 2));
  }
  w.blocks = blocks.data();
}

}  // namespace minilm
