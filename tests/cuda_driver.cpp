// The index arithmetic of the CUDA kernels, for ctypes; linked with the emulated kernels.

#include "cuda/emulation.h"
#include "cuda/philox.h"
#include "cuda/tiling.h"

using namespace minilm::cuda;

#define MINILM_EXPORT extern "C" __attribute__((visibility("default")))

MINILM_EXPORT void falling(int on) { emulation::falling = on != 0; }

MINILM_EXPORT void visible_range(int context, int window, int split, int splits, int* out) {
  const Range range = split_range(visible(context, window), split, splits);
  out[0] = range.begin, out[1] = range.end;
}
MINILM_EXPORT int splits_for(long long tiles, int context, int count) {
  return decode_splits(tiles, context, count);
}

MINILM_EXPORT void rope_row_of(long long row, int q_heads, int kv_heads, long long* out) {
  const RopeRow at = rope_row(row, q_heads, kv_heads);
  out[0] = at.token, out[1] = static_cast<int>(at.role), out[2] = at.head;
}

MINILM_EXPORT int tiles_of(int out, int gated) { return linear_tiles(out, gated != 0); }
MINILM_EXPORT int row_of(int tile, int r, int out, int gated) { return linear_row(tile, r, out, gated != 0); }
MINILM_EXPORT int columns_held(int rows) { return tile_columns(rows); }
MINILM_EXPORT int stride_held(int columns) { return tile_stride(columns); }

MINILM_EXPORT long long words(int out, int in, int bits) { return packed_words(out, in, bits); }
MINILM_EXPORT long long scales(int out, int in) { return packed_scales(out, in); }
MINILM_EXPORT long long place(int row, int column, int in, int bits) {
  return packed_place(row, column, in, bits);
}
MINILM_EXPORT long long scale_place(int row, int group, int in) { return packed_scale(row, group, in); }
MINILM_EXPORT void code_at(long long place, int in, int bits, int* out) {
  const Code code = packed_code(place, in, bits);
  out[0] = code.row, out[1] = code.column;
}
MINILM_EXPORT void scale_at(long long place, int in, int* out) {
  const Code code = packed_scale_code(place, in);
  out[0] = code.row, out[1] = code.column;
}

MINILM_EXPORT void philox_of(const unsigned* counter, unsigned long long key, unsigned* out) {
  const Random r = philox({counter[0], counter[1], counter[2], counter[3]}, key);
  for (int i = 0; i < 4; ++i) out[i] = r.x[i];
}
MINILM_EXPORT unsigned long long bits_of(long long seed, long long sequence, long long step) {
  return random_bits(seed, sequence, step);
}

namespace {

// Writes which element of a head each lane holds: of keys [lane t][4 a step], of values [column][a tile].
template <int D, int kBytes>
void elements(int* keys, int* values) {
  using Keys = Segments<D / 16, 4 / kBytes>;
  using Values = Segments<D / 8, 16 / kBytes>;
  for (int i = 0; i < Keys::kCount; ++i)
    for (int step = 0; step < Keys::units(i); ++step)
      for (int t = 0; t < 4; ++t)
        for (int e = 0; e < 4; ++e) *keys++ = key_element(Keys::first(i), Keys::units(i), step, t) + e;
  for (int i = 0; i < Values::kCount; ++i)
    for (int tile = 0; tile < Values::units(i); ++tile)
      for (int column = 0; column < 8; ++column)
        *values++ = value_element(Values::first(i), Values::units(i), tile, column);
}

template <int D>
void elements(int bytes, int* keys, int* values) {
  bytes == 1 ? elements<D, 1>(keys, values) : elements<D, 2>(keys, values);
}

}  // namespace

MINILM_EXPORT void head_elements(int head_dim, int bytes, int* keys, int* values) {
  switch (head_dim) {
    case 32:
      return elements<32>(bytes, keys, values);
    case 64:
      return elements<64>(bytes, keys, values);
    case 80:
      return elements<80>(bytes, keys, values);
    case 96:
      return elements<96>(bytes, keys, values);
    case 128:
      return elements<128>(bytes, keys, values);
  }
}
MINILM_EXPORT int token_of(int i, int t) { return value_token(i, t); }
