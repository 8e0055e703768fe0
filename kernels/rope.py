"""Rotary embedding, the append to the paged cache, and both in one pass (Su et al. 2021, arXiv:2104.09864).

With c, s the cosine and sine of a token's angles, for the pairs (i, i + D/2) of each head of q and of k:

    y_i       = x_i c_i - x_(i + D/2) s_i
    y_(i+D/2) = x_(i + D/2) c_i + x_i s_i

The derivative rotates back: the same with -s. The append copies k (rotated) and v of token t to slot slots[t]
of the pages, unchanged or, for int8 pages, as round(x / scale), scale = max |x| / 127 over a head's D.

Layout: q [T, H, D], k and v [T, Hkv, D], any strides; cos, sin float32 [T, D/2]; pages [pages, page size,
Hkv, D], a slot is page * page size + offset. A program processes one token and some heads of q, of k or of v;
each element is read twice, for itself and for its partner, the second time from L1.

Bytes per token, with b bytes per element: rope 2 (H + Hkv) D b + 4 D; the append 2 Hkv D (b + cache's b) + 8;
both together save the second read of k. Three operations per element: limited by memory bandwidth.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .devices import device_of
from .heuristics import next_power_of_2, rope_block
from .registration import kernel_op


def twin(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Each element with its partner, in NumPy: x [T, H, D], cos and sin [T, D/2] -> [T, H, D]."""
    half = x.shape[2] // 2
    i = np.arange(x.shape[2])
    partner = x[:, :, (i + half) % x.shape[2]]
    sign = np.where(i < half, -1, 1)
    return x * cos[:, None, i % half] + sign * partner * sin[:, None, i % half]


def quantise_twin(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values for int8 pages and their scales, in NumPy: x [..., D] -> int8 [..., D], [...]."""
    scale = np.abs(x).max(-1) / 127
    return np.rint(x / np.where(scale == 0, 1, scale)[..., None]).astype(np.int8), scale


@triton.jit
def _read(X, token, head, d, x_t, x_h, x_d, inside):
    place = token * x_t + head[:, None] * x_h + d[None, :] * x_d
    return tl.load(X + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _turned(X, COS, SIN, token, head, d, x_t, x_h, x_d, inside, D: tl.constexpr, BACK: tl.constexpr):
    """Heads of one token in float32, turned by its angles, or back."""
    half: tl.constexpr = D // 2
    angle = token * half + d % half
    c = tl.load(COS + angle, mask=d < D, other=0.0).to(tl.float32)
    s = tl.load(SIN + angle, mask=d < D, other=0.0).to(tl.float32)
    s = tl.where((d < half) == BACK, s, -s)
    x = _read(X, token, head, d, x_t, x_h, x_d, inside)
    partner = _read(X, token, head, (d + half) % D, x_t, x_h, x_d, inside)
    return x * c[None, :] + partner * s[None, :]


@triton.jit
def _put(PAGES, SCALES, slot, head, d, x, p_s, p_h, p_d, heads, inside, INT8: tl.constexpr):
    """Heads of one token to their slot."""
    x = x.to(tl.float32)
    if INT8:
        scale = tl.div_rn(tl.max(tl.abs(x), axis=1), 127.0)
        tl.store(SCALES + slot * heads + head, scale, mask=head < heads)
        x = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)[:, None])
        x = (x + 12582912.0) - 12582912.0  # from 2^23 on there are no fractions; ties to even
        x = tl.minimum(tl.maximum(x, -127.0), 127.0)
    place = slot * p_s + head[:, None] * p_h + d[None, :] * p_d
    tl.store(PAGES + place, x.to(PAGES.dtype.element_ty), mask=inside)


@triton.jit
def _rope(
    Q, K, COS, SIN, Q_OUT, K_OUT, q_t, q_h, q_d, k_t, k_h, k_d, H: tl.constexpr, HKV: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (H + HEADS - 1) // HEADS
    d = tl.arange(0, BLOCK_D)
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        inside = (head[:, None] < H) & (d[None, :] < D)
        q = _turned(Q, COS, SIN, token, head, d, q_t, q_h, q_d, inside, D, BACK)
        tl.store(Q_OUT + (token * H + head[:, None]) * D + d, q.to(Q_OUT.dtype.element_ty), mask=inside)
    else:
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        inside = (head[:, None] < HKV) & (d[None, :] < D)
        k = _turned(K, COS, SIN, token, head, d, k_t, k_h, k_d, inside, D, BACK)
        tl.store(K_OUT + (token * HKV + head[:, None]) * D + d, k.to(K_OUT.dtype.element_ty), mask=inside)


@triton.jit
def _append(
    Q, K, V, COS, SIN, Q_OUT, K_OUT, K_PAGES, V_PAGES, K_SCALES, V_SCALES, SLOTS,
    q_t, q_h, q_d, k_t, k_h, k_d, v_t, v_h, v_d, kp_s, kp_h, kp_d, vp_s, vp_h, vp_d,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr, ROPE: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """k and v to their slots; with ROPE, k turned before, and q too."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)  # those of k, then v's, then q's
    kv_blocks: tl.constexpr = (HKV + HEADS - 1) // HEADS
    d = tl.arange(0, BLOCK_D)
    if block < 2 * kv_blocks:
        slot = tl.load(SLOTS + token)
        head = block % kv_blocks * HEADS + tl.arange(0, HEADS)
        inside = (head[:, None] < HKV) & (d[None, :] < D)
        if block < kv_blocks:
            if ROPE:
                k = _turned(K, COS, SIN, token, head, d, k_t, k_h, k_d, inside, D, False)
                k = k.to(K_OUT.dtype.element_ty)
                tl.store(K_OUT + (token * HKV + head[:, None]) * D + d, k, mask=inside)
            else:
                k = _read(K, token, head, d, k_t, k_h, k_d, inside)
            _put(K_PAGES, K_SCALES, slot, head, d, k, kp_s, kp_h, kp_d, HKV, inside, INT8)
        else:
            v = _read(V, token, head, d, v_t, v_h, v_d, inside)
            _put(V_PAGES, V_SCALES, slot, head, d, v, vp_s, vp_h, vp_d, HKV, inside, INT8)
    elif ROPE:
        head = (block - 2 * kv_blocks) * HEADS + tl.arange(0, HEADS)
        inside = (head[:, None] < H) & (d[None, :] < D)
        q = _turned(Q, COS, SIN, token, head, d, q_t, q_h, q_d, inside, D, False)
        tl.store(Q_OUT + (token * H + head[:, None]) * D + d, q.to(Q_OUT.dtype.element_ty), mask=inside)


def _empty(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
    )


@kernel_op("minilm_triton::rope", mutates_args={})
def rope_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """q and k rotated by the angles, or by their negatives."""
    q_out, k_out = _empty(q, k)
    tokens, heads, size = q.shape
    if tokens:
        block_d = next_power_of_2(size)
        block = rope_block(heads, size, tokens, device_of(q.device))
        tile = block.heads
        wrap_triton(_rope)[(tokens, triton.cdiv(heads, tile) + triton.cdiv(k.shape[1], tile))](
            q, k, cos.contiguous(), sin.contiguous(), q_out, k_out, *q.stride(), *k.stride(),
            H=heads, HKV=k.shape[1], D=size, BLOCK_D=block_d, HEADS=tile, BACK=back,
            num_warps=block.num_warps,
        )  # fmt: skip
    return q_out, k_out


@rope_op.register_fake
def _(q, k, cos, sin, back):
    return _empty(q, k)


def _setup(ctx, inputs, output):
    _, _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx, dq, dk):
    return (*rope_op(dq, dk, *ctx.saved_tensors, not ctx.back), None, None, None)


rope_op.register_autograd(_gradient, setup_context=_setup)


def _launch_append(
    q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor], q_out: Tensor, k_out: Tensor,
    k_pages: Tensor, v_pages: Tensor, slots: Tensor, k_scales: Tensor | None, v_scales: Tensor | None,
    rope: bool,
) -> None:  # fmt: skip
    tokens, kv_heads, size = k.shape
    if not tokens:
        return
    k_slots, v_slots = k_pages.view(-1, kv_heads, size), v_pages.view(-1, kv_heads, size)
    block_d = next_power_of_2(size)
    block = rope_block(q.shape[1], size, tokens, device_of(k.device))
    tile = block.heads
    blocks = 2 * triton.cdiv(kv_heads, tile) + rope * triton.cdiv(q.shape[1], tile)
    wrap_triton(_append)[(tokens, blocks)](
        q, k, v, *angles, q_out, k_out, k_slots, v_slots, k_slots if k_scales is None else k_scales,
        v_slots if v_scales is None else v_scales, slots,
        *q.stride(), *k.stride(), *v.stride(), *k_slots.stride(), *v_slots.stride(),
        H=q.shape[1], HKV=kv_heads, D=size, BLOCK_D=block_d, HEADS=tile,
        ROPE=rope, INT8=k_scales is not None, num_warps=block.num_warps,
    )  # fmt: skip


WRITTEN = ("k_pages", "v_pages", "k_scales", "v_scales")


@kernel_op("minilm_triton::append_kv", mutates_args=WRITTEN)
def append_kv_op(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:  # fmt: skip
    """Store k and v in the slots; scales for int8 pages are contiguous."""
    _launch_append(k, k, v, (k, k), k, k, k_pages, v_pages, slots, k_scales, v_scales, rope=False)


@append_kv_op.register_fake
def _(k, v, k_pages, v_pages, slots, k_scales, v_scales):
    return None


@kernel_op("minilm_triton::rope_append", mutates_args=WRITTEN)
def rope_append_op(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor,
    slots: Tensor, k_scales: Tensor | None, v_scales: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns q and k rotated; stores the rotated k and v in the slots."""
    q_out, k_out = _empty(q, k)
    angles = cos.contiguous(), sin.contiguous()
    _launch_append(
        q, k, v, angles, q_out, k_out, k_pages, v_pages, slots, k_scales, v_scales, rope=True
    )  # fmt: skip
    return q_out, k_out


@rope_append_op.register_fake
def _(q, k, *rest):
    return _empty(q, k)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `minilm.ops.rope`; no derivative with respect to the angles."""
    q_out, k_out = rope_op(q, k, cos, sin, False)
    return q_out, k_out


def append_kv(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor,
    k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """See `minilm.ops.append_kv`."""
    append_kv_op(k, v, k_pages, v_pages, slots, k_scales, v_scales)


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor,
    slots: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `minilm.ops.rope_append`."""
    q_out, k_out = rope_append_op(q, k, v, cos, sin, k_pages, v_pages, slots, k_scales, v_scales)
    return q_out, k_out
