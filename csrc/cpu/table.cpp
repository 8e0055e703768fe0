// This instruction set's row of the kernel table.

#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/norms.h"
#include "cpu/transformer.h"

namespace minilm::MINILM_ISA {

#define MINILM_TEXT_OF(name) #name
#define MINILM_TEXT(name) MINILM_TEXT_OF(name)

extern const CpuKernels kKernels;
const CpuKernels kKernels = {
    MINILM_TEXT(MINILM_ISA),
    kPanel,
    layer_norm,
    packed_bytes,
    pack,
    unpack,
    prepared_row_bytes,
    prepare_rows,
    linear,
    rms_norm,
    rope,
    append_rows,
    attention_scratch,
    attention,
    paged_chunks,
    paged_blocks,
    paged_partial,
    paged_scratch,
    paged_chunk,
    paged_merge,
    paged_block,
    stretches,
    most_stretches,
    decode_partials,
    decode_scratch,
    decode,
    combine,
    transformer_counters,
    transformer_workspace,
    transformer,
};

}  // namespace minilm::MINILM_ISA
