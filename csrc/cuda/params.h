// Parameters of the CUDA kernels: plain pointers, strides and sizes. Strides count elements.
#pragma once

#include <cstdint>

namespace minilm::cuda {

enum class Data : std::int32_t { kFloat16, kBFloat16, kFloat32, kInt8 };

// The queries, keys and values of new tokens: rotated by their angles and stored in the cache.
struct RopeAppendParams {
  Data data;         // of q, k, v: float16 or bfloat16
  Data cache;        // of the pages: that of the data, or int8
  const void* q;     // [T, H, D]; null: only append
  const void* k;     // [T, Hkv, D]
  const void* v;     // [T, Hkv, D]
  const float* cos;  // [T, D / 2]; null: only append
  const float* sin;  // [T, D / 2]
  void* q_out;       // [T, H, D]
  void* k_out;       // [T, Hkv, D]
  void* k_pages;     // [slots, Hkv, D]
  void* v_pages;     // [slots, Hkv, D]
  float* k_scales;   // [slots, Hkv] beside int8 pages
  float* v_scales;
  const std::int64_t* slots;  // [T]; a slot that the cache does not have is not written
  std::int64_t slot_count;
  std::int64_t tokens;
  std::int64_t q_stride, k_stride, v_stride;  // between tokens; the heads of a token lie side by side
  std::int32_t heads, kv_heads, head_dim;
};

// One new token per sequence attends to its own past, which is in pages.
struct DecodeParams {
  Data data;            // of q and out: float16 or bfloat16
  Data cache;           // of the pages: that of the data, or int8
  const void* q;        // [B, H, D]
  const void* k_pages;  // [pages, page size, Hkv, D]
  const void* v_pages;
  const float* k_scales;  // [pages, page size, Hkv] beside int8 pages
  const float* v_scales;
  const std::int32_t* block_table;   // [B, table_stride]
  const std::int32_t* context_lens;  // [B]; 0 gives zeros
  void* out;                         // [B, H, D]
  float* partial;                    // [B, H, splits, D], for more than one split
  float* lse;                        // [B, H, splits]: log2 of the sum of exp2 of the scores
  std::int64_t q_stride;
  std::int64_t table_stride;
  std::int32_t batch, heads, kv_heads, head_dim, page_size;
  std::int32_t window;  // keys that are seen; 0: all
  std::int32_t splits;
  float scale;  // of the scores
};

enum class Weights : std::int32_t { k16Bit, kInt8, kQ8, kQ4, kQ4WithMinimum };
enum class Norm : std::int32_t { kNone, kRms, kLayer };
enum class Activation : std::int32_t { kNone, kGelu, kGeluTanh, kSilu, kRelu, kQuickGelu };

// y = activation(norm(x) W^T + bias) + residual; gated: activation(gate) * up + residual, where W has the
// rows of gate and then those of up.
struct LinearParams {
  Data data;  // of x, y, 16-bit weights and all vectors: float16 or bfloat16
  Weights weights;
  Norm norm;
  Activation activation;
  const void* x;            // [rows, in]
  const void* weight;       // [out, in], or codes as `pack` leaves them
  const void* scale;        // kInt8: float32 [out]; grouped: float16 as `pack` leaves them
  const void* minimum;      // kQ4WithMinimum: float16, as scale
  const void* bias;         // [out] or null
  const void* norm_weight;  // [in]
  const void* norm_bias;    // [in] or null
  const void* residual;     // [rows, columns of y] or null
  void* y;                  // [rows, out], gated [rows, out / 2]
  std::int64_t x_stride, residual_stride;
  std::int32_t rows;  // 1 .. 8
  std::int32_t out, in;
  std::int32_t gated;
  float eps;
};

// Codes or scales of a quantised weight, from rows to the order in which lanes read them.
struct PackParams {
  enum class What : std::int32_t { kInt8, kInt4, kScales } what;
  const void* from;  // [out, in] int8; [out, in / 2] uint8; [out, in / 32] float16
  void* to;          // tiling.h: packed_words() of 4 bytes; scales: packed_scales() of 2
  std::int32_t out, in;
};

// A token for each row of scores.
struct SampleParams {
  Data data;                     // of logits: float16, bfloat16 or float32
  const void* logits;            // [B, V]
  const float* temperature;      // [B]; 0: take the best
  const std::int32_t* top_k;     // [B]; 0: off
  const float* top_p;            // [B]; 1: off
  const float* min_p;            // [B]; 0: off
  const std::int64_t* seed;      // [B]
  const std::int64_t* sequence;  // [B]
  const std::int64_t* step;      // [B]
  std::int64_t* token;           // [B]; -1 where the scores are NaN or rule out every token
  std::int64_t stride;
  std::int32_t rows, vocabulary;
};

// Each starts its kernels on `stream` (a cudaStream_t) and returns null, or what went wrong.
const char* rope_append(const RopeAppendParams& p, void* stream);
const char* decode_attention(const DecodeParams& p, void* stream);
const char* decode_attention_mma(const DecodeParams& p, void* stream);
const char* decode_combine(const DecodeParams& p, void* stream);
const char* linear(const LinearParams& p, int multiprocessors, void* stream);
const char* pack(const PackParams& p, void* stream);
const char* sample(const SampleParams& p, void* stream);
const char* multiprocessors(int* count);  // of the current device

}  // namespace minilm::cuda
