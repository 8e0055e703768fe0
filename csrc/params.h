// Parameters of the kernels: plain pointers, strides and sizes. Shared by the bindings and all kernels.
#pragma once

#include <cstdint>

namespace minilm {

enum class DType : std::uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt8 };  // kInt8: of pages only

// Rows of C channels. A row is contiguous; row i of x starts x_stride elements after row i - 1. Results are
// contiguous. Statistics are in float64 for float64 data, in float32 for all other.
struct LayerNormParams {
  const void* x;         // [rows, C], dtype
  const void* residual;  // [rows, C], dtype; null: nothing is added
  const void* weight;    // [C], parameter_dtype: dtype or float32
  const void* bias;      // [C], parameter_dtype; null: none
  void* y;               // [rows, C], dtype
  void* sum;             // [rows, C], dtype: x + residual; null without residual
  void* mean;            // [rows], statistics
  void* rstd;            // [rows], statistics: 1 / sqrt(variance + eps)
  std::int64_t channels;
  std::int64_t x_stride;
  std::int64_t residual_stride;
  double eps;
  DType dtype;
  DType parameter_dtype;
};

// Like LayerNormParams, without mean and bias.
struct RmsNormParams {
  const void* x;         // [rows, C], dtype
  const void* residual;  // [rows, C], dtype; null: nothing is added
  const void* weight;    // [C], parameter_dtype: dtype or float32
  void* y;               // [rows, C], dtype
  void* sum;             // [rows, C], dtype: x + residual; null without residual
  void* rstd;            // [rows], statistics: 1 / sqrt(mean(x^2) + eps); null: not wanted
  std::int64_t channels;
  std::int64_t x_stride;
  std::int64_t residual_stride;
  std::int64_t y_stride;
  double eps;
  DType dtype;
  DType parameter_dtype;
};

// Rows of heads to their slots of the pages.
struct AppendParams {
  DType dtype;     // of the pages
  const float* x;  // [T, heads, head_dim]: row t at x + t * x_stride
  std::int64_t x_stride;
  std::int64_t heads;
  std::int64_t head_dim;
  void* pages;                // [slots, heads, head_dim]
  float* scales;              // [slots, heads], beside pages of kInt8; else null
  const std::int64_t* slots;  // [T]
};

// Rotary embedding in place, and the append to the cache, of the rows of one fused projection q | k | v.
struct RopeParams {
  float* q;          // [T, H, D]: row t at q + t * stride
  float* k;          // [T, Hkv, D], the same stride
  const float* v;    // the same; null with k_pages null
  const float* cos;  // [T, rotated / 2]; null: nothing is turned
  const float* sin;
  const float* q_norm;  // RMSNorm before rope, of each head, [D], or of all of them, [H D]; null: none
  const float* k_norm;
  void* k_pages;  // [slots, Hkv, D], cache_dtype; null: nothing is appended
  void* v_pages;
  float* k_scales;  // [slots, Hkv], beside pages of kInt8; else null
  float* v_scales;
  const std::int64_t* slots;  // [T]
  std::int64_t stride;
  std::int64_t heads;
  std::int64_t kv_heads;
  std::int64_t head_dim;
  std::int64_t rotated;  // the first so many channels of a head are turned; even
  bool norm_of_all;      // q_norm and k_norm are of all heads at once
  float eps;
  DType cache_dtype;
};

// softmax(scale q k^T) v for packed sequences. Keys and values are rows beside the queries (block_table
// null), or stand in the pages of a cache.
struct AttentionParams {
  const float* q;  // [Tq, H, D]: row t at q + t * q_stride
  const void* k;   // rows: float32, row t at k + t * kv_stride; pages: [pages, page_size, Hkv, D]
  const void* v;
  const float* k_scales;  // [pages, page_size, Hkv], beside pages of kInt8; else null
  const float* v_scales;
  float* out;                       // [Tq, H, D] contiguous
  const std::int32_t* cu_q;         // [B + 1]
  const std::int32_t* cu_k;         // [B + 1]; null with pages
  const std::int32_t* block_table;  // [B, table_width]; null: rows
  const std::int32_t* context;      // [B], keys of each sequence; null with rows
  std::int64_t q_stride;
  std::int64_t kv_stride;
  std::int64_t table_width;
  std::int64_t page_size;
  std::int64_t heads;
  std::int64_t kv_heads;
  std::int64_t head_dim;
  std::int64_t window;  // 0: none
  float scale;
  float soft_cap;  // scores s become soft_cap tanh(s / soft_cap); 0: they do not
  bool causal;
  bool pairs;  // what is multiplied is rounded to bfloat16, where the instruction set has such products
  DType cache_dtype;  // of pages
};

// Floats of partial results that attention of few queries over pages may leave; with more, a task is a block
// of queries (cpu/paged_attention.cpp).
constexpr std::int64_t kMostPartials = std::int64_t{1} << 20;

// Formats of the weights of a linear layer.
enum class Format : std::int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kInt8 = 3,  // value = scale * code; one scale an output; x has one for each 192 inputs of a row
  kQ8 = 4,    // value = scale * code; one scale for each 32 inputs of an output, and of a row of x
  kQ4 = 5,    // value = scale * code + minimum, code 0..15; else as kQ8
};
constexpr int kGroup = 32;  // inputs that share a scale in kQ8 and kQ4

enum class Activation : std::int32_t {
  kNone = 0,
  kGelu = 1,  // x Phi(x), by erf
  kGeluTanh = 2,
  kSilu = 3,
  kRelu = 4,
  kQuickGelu = 5,  // x sigmoid(1.702 x)
  kTanh = 6,
};

// A weight [out, in] to be packed into panels (see cpu/linear.h). Rows are contiguous.
struct PackParams {
  Format format;
  std::int64_t out;
  std::int64_t in;
  const void* values;     // float formats: [out, in]; kInt8, kQ8: int8 codes [out, in]; kQ4: [out, in / 2]
  const float* scales;    // kInt8: [out]; kQ8, kQ4: [out, in / 32]; else null
  const float* minimums;  // kQ4: [out, in / 32]; else null
  const float* bias;      // [out] or null
  const std::int32_t* order;  // [places]: which row stands at each place of the panels, -1: none
  std::int64_t places;        // a multiple of the panel's width
  void* packed;
};

// Rows of a quantised weight, out of its panels: the inverse of PackParams, bit for bit.
struct UnpackParams {
  Format format;  // kInt8, kQ8, kQ4
  std::int64_t in;
  std::int64_t places;        // as packed
  const std::int32_t* order;  // [end - begin]: the row of `values` for each place, -1: none
  const void* packed;
  void* values;    // as in PackParams
  void* scales;    // kInt8: float32; kQ8, kQ4: float16
  void* minimums;  // kQ4: float16, or null
};

// y = activation(x W^T + bias), or y += x W^T + bias, on packed weights and prepared rows.
struct LinearParams {
  Format format;
  Activation activation;
  bool gated;       // panels alternate between gate and up; y = activation(gate) * up has half the columns
  bool accumulate;  // add to y
  std::int64_t in;
  std::int64_t places;   // outputs with padding, as packed
  std::int64_t columns;  // of y: beyond it nothing is written
  const void* packed;
  const void* x;          // rows as prepare_rows leaves them; for the float formats float32 rows
  std::int64_t x_stride;  // bytes between rows of x
  std::int64_t rows;
  float* y;
  std::int64_t y_stride;  // elements
};

// A packed linear layer of a Transformer.
struct PackedWeight {
  const void* packed;
  Format format;
  std::int64_t in;
  std::int64_t places;
  std::int64_t columns;
};

// Weight and bias (null for RMSNorm) of a norm, [C]; a null weight: there is none.
using Norm = const float* [2];

// The norms of a sub-layer f: x = sum(x + added(f(read(x)))).
struct SubLayerNorms {
  Norm read, added, sum;
};

enum class Turns : std::int32_t { kNot = 0, kByRope = 1, kByLocalRope = 2 };

// One block: the weights, and the settings that differ between layers.
struct BlockWeights {
  PackedWeight qkv, out, up, down;  // up: gate and up in alternating panels, where the MLP is gated
  SubLayerNorms attention, mlp;
  const float* q_norm;  // [D], or [H D] with qk_norm_of_all; null: none
  const float* k_norm;
  std::int64_t window;  // 0: none
  float scale;
  Turns turns;  // by which angles q and k are turned
};

struct TransformerWeights {
  const BlockWeights* blocks;
  Norm final_norm;
  std::int64_t layers, channels, heads, kv_heads, head_dim, inner;
  std::int64_t rotated;  // channels of a head that rope turns
  float eps;
  float soft_cap;  // of the scores; 0: none
  Activation activation;
  bool gated, rms, causal;
  bool parallel;  // attention and MLP read the same x
  bool qk_norm_of_all;
};

// One forward pass of packed sequences through all blocks.
// What a thread of a team did beside its tasks, in nanoseconds.
struct Waited {
  std::int64_t spun = 0, slept = 0;
};

struct TransformerParams {
  const TransformerWeights* weights;
  float* x;                        // [T, C]: the embeddings, then the hidden states
  const std::int32_t* cu_seqlens;  // [B + 1]
  const float* cos;                // [T, rotated / 2] or null
  const float* sin;
  const float* local_cos;  // the same for layers with a rope of their own
  const float* local_sin;
  char* k_pages;  // [layers, pages, page_size, Hkv, D] or null: no cache
  char* v_pages;
  float* k_scales;  // [layers, pages, page_size, Hkv], of a cache of kInt8; else null
  float* v_scales;
  const std::int64_t* slots;         // [T]
  const std::int32_t* block_table;   // [B, table_width]
  const std::int32_t* context_lens;  // [B]
  std::int64_t layer_bytes;          // from one layer's pages to the next
  std::int64_t layer_scales;         // the same, of scales, in numbers
  std::int64_t table_width;
  std::int64_t page_size;
  std::int64_t tokens, sequences;
  std::int64_t max_keys;
  std::int64_t threads;
  DType cache_dtype;
  bool fresh;                // no sequence had a past: attention looks at the new tokens only
  bool one_each;             // not fresh, and one new token for each sequence: a decode step
  const PackedWeight* head;  // [V, C], applied to the result; null: nothing is
  const float* head_bias;    // [V], added to the logits; null: none
  float head_soft_cap;       // logits s become head_soft_cap tanh(s / head_soft_cap); 0: they do not
  float* logits;             // [T, V]
  DType logits_dtype;        // they are rounded to it
  std::int64_t* best;        // [T]: the first of the highest logits; the first NaN, if there is one
  char* workspace;           // transformer_workspace bytes, the first transformer_counters of them zero
};

}  // namespace minilm
