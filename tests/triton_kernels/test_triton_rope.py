"""Triton's rope and cache append in the interpreter: against float64, their NumPy twins, the reference, and
PyTorch's rules for ops; and what they make of a decoder, with the attention over the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from close import assert_as_good_as_eager, assert_close
from hypothesis import given
from hypothesis import strategies as st
from pairs import model_of
from strategies import examples, seeds, small
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from minilm import ops
from minilm.kernels.devices import CHIPS
from minilm.kernels.heuristics import next_power_of_2, rope_block
from minilm.kernels.rope import append_kv_op, quantise_twin, rope_append_op, rope_op, twin
from minilm.ops import reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = st.sampled_from([0, 1, 3, 17])
HEADS = st.sampled_from([(1, 1), (4, 4), (9, 3), (6, 1), (33, 11)])


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, strided: bool = False) -> Tensor:
    """Normal numbers around a mean of one; `strided`: heads lie apart."""
    g = torch.Generator().manual_seed(seed)
    if strided:
        wide = torch.randn(shape[0], 2 * shape[1], *shape[2:], generator=g)
        return (wide + 1).to(dtype)[:, ::2]
    return (torch.randn(shape, generator=g) + 1).to(dtype)


def angles(seed: int, tokens: int, size: int) -> tuple[Tensor, Tensor]:
    turn = 100 * torch.rand(tokens, size // 2, generator=torch.Generator().manual_seed(seed))
    return turn.cos(), turn.sin()


def turned(
    tensors: list[Tensor], cos: Tensor, sin: Tensor, upstream: list[Tensor], backend: str
) -> list[Tensor]:
    """q and k turned, and the gradients of both."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with ops.backend(backend):
        outs = ops.rope(*leaves, cos, sin)
    grads = torch.autograd.grad(outs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outs, strict=True)])
    return [*(o.detach() for o in outs), *grads]


@pytest.mark.slow
@examples(25)
@given(
    tokens=TOKENS,
    heads=HEADS,
    size=st.sampled_from([2, 6, 16, 64, 80, 96, 128]),
    dtype=st.sampled_from(FLOATS),
    strided=st.booleans(),
    seed=seeds(),
)
def test_rope_and_its_derivative_err_no_more_than_twice_eager(
    tokens: int, heads: tuple[int, int], size: int, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    tensors = [random(seed + i, tokens, h, size, dtype=dtype, strided=strided) for i, h in enumerate(heads)]
    upstream = [random(seed + 2 + i, tokens, h, size, dtype=dtype) for i, h in enumerate(heads)]
    cos, sin = angles(seed, tokens, size)
    exact = turned([t.double() for t in tensors], cos.double(), sin.double(), upstream, "reference")
    eager, ours = (turned(tensors, cos, sin, upstream, backend) for backend in ("reference", "triton"))
    for name, a, b, e in zip(("q", "k", "dq", "dk"), ours, eager, exact, strict=True):
        assert_as_good_as_eager(a, b, e, what=name)


def slots_for(seed: int, tokens: int, pages: int, page_size: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randperm(pages * page_size, generator=g)[:tokens]


def empty_cache(pages: int, page_size: int, heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Pages of k and v (and scales) that hold something already."""
    shape = (pages, page_size, heads, size)
    stores = [torch.full(shape, 5, dtype=dtype) for _ in range(2)]
    return stores + ([torch.full(shape[:3], 7.0) for _ in range(2)] if dtype == torch.int8 else [])


@pytest.mark.slow
@examples(25)
@given(
    tokens=TOKENS,
    heads=HEADS,
    size=st.sampled_from([1, 5, 16, 64, 80, 128]),
    page_size=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from(FLOATS),
    cache_dtype=st.sampled_from([*FLOATS, torch.int8]),
    strided=st.booleans(),
    seed=seeds(),
)
def test_append_is_the_reference(
    tokens: int,
    heads: tuple[int, int],
    size: int,
    page_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    strided: bool,
    seed: int,
) -> None:
    k, v = (random(seed + i, tokens, heads[1], size, dtype=dtype, strided=strided) for i in range(2))
    pages = -(-tokens // page_size) + 1
    slots = slots_for(seed, tokens, pages, page_size)
    caches = []
    for backend in ("reference", "triton"):
        caches.append(empty_cache(pages, page_size, heads[1], size, cache_dtype))
        with ops.backend(backend):
            ops.append_kv(k, v, *caches[-1][:2], slots, *caches[-1][2:])
    if cache_dtype == torch.bfloat16 != dtype:  # the interpreter cuts off where a GPU rounds
        for ours, theirs in zip(*caches, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)
        return
    for ours, theirs in zip(*caches, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@examples(15)
@given(
    tokens=TOKENS,
    heads=HEADS,
    size=st.sampled_from([2, 16, 64, 80]),
    dtype=st.sampled_from(FLOATS),
    cache_dtype=st.sampled_from([*FLOATS, torch.int8]),
    strided=st.booleans(),
    seed=seeds(),
)
def test_rope_append_is_rope_and_append_bit_for_bit(
    tokens: int,
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    strided: bool,
    seed: int,
) -> None:
    q, k, v = (
        random(seed + i, tokens, h, size, dtype=dtype, strided=strided)
        for i, h in enumerate((heads[0], heads[1], heads[1]))
    )
    cos, sin = angles(seed, tokens, size)
    pages = tokens // 16 + 1
    slots = slots_for(seed, tokens, pages, 16)
    both, apart = (empty_cache(pages, 16, heads[1], size, cache_dtype) for _ in range(2))
    with ops.backend("triton"):
        results = ops.rope_append(q, k, v, cos, sin, *both[:2], slots, *both[2:])
        expected = ops.rope(q, k, cos, sin)
        ops.append_kv(expected[1], v, *apart[:2], slots, *apart[2:])
    for ours, theirs in zip((*results, *both), (*expected, *apart), strict=True):
        assert torch.equal(ours, theirs)


def test_int8_rounds_to_the_nearest_and_ties_to_even() -> None:
    k = torch.tensor([[[127.0, 0.5, 1.5, 2.5, -0.5, -126.6]], [[0.0] * 6], [[-1e-38, 1e-38, 0, 0, 0, 0]]])
    for backend in ("triton", "reference"):
        stores = empty_cache(1, 4, 1, 6, torch.int8)
        with ops.backend(backend):
            ops.append_kv(k, k * 2, *stores[:2], torch.tensor([3, 0, 1]), *stores[2:])
        k_pages, v_pages, k_scales, v_scales = (x[0, :, 0] for x in stores)
        assert k_pages[3].tolist() == v_pages[3].tolist() == [127, 0, 2, 2, 0, -127]
        assert (k_scales[3], v_scales[3], k_scales[0]) == (1, 2, 0)
        assert not k_pages[0].any()
        assert k_pages[2].tolist() == [5] * 6, "a slot of no token was written"
        assert int(k_pages[1].abs().max()) <= 127


def test_the_numpy_twins_say_the_same() -> None:
    x, (cos, sin) = random(0, 5, 3, 10), angles(1, 5, 10)
    ours = rope_op(x, x, cos, sin, False)[0]
    theirs = twin(*(t.double().numpy() for t in (x, cos, sin)))
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)
    stores = empty_cache(1, 5, 3, 10, torch.int8)
    append_kv_op(x, x, *stores[:2], torch.arange(5), *stores[2:])
    codes, scales = quantise_twin(x.numpy())
    np.testing.assert_array_equal(stores[0][0].numpy(), codes)
    np.testing.assert_array_equal(stores[3][0].numpy(), scales)


def test_turning_back_undoes_it() -> None:
    x, (cos, sin) = random(0, 5, 3, 16), angles(1, 5, 16)
    q, k = rope_op(*rope_op(x, x[:, :1], cos, sin, False), cos, sin, True)
    assert_close(q, x, atol=1e-5)
    assert_close(k, x[:, :1], atol=1e-5)


def test_opcheck() -> None:
    q, k, v = (random(i, 3, h, 6).requires_grad_() for i, h in enumerate((4, 2, 2)))
    cos, sin = angles(0, 3, 6)
    torch.library.opcheck(rope_op, (q, k, cos, sin, False))
    q, k, v = (x.detach() for x in (q, k, v))
    for dtype in (torch.bfloat16, torch.int8):
        stores = empty_cache(2, 3, 2, 6, dtype)
        where = (*stores[:2], torch.tensor([5, 0, 3]), *(stores[2:] or [None, None]))
        torch.library.opcheck(append_kv_op, (k, v, *where))
        torch.library.opcheck(rope_append_op, (q, k, v, cos, sin, *where))


def test_a_decode_step_is_one_graph() -> None:
    """Rope, append and attention; the cache is written by the graph as it is without one."""
    q, k, v = (random(i, 2, h, 16) for i, h in enumerate((4, 2, 2)))
    cos, sin = angles(0, 2, 16)
    table = torch.tensor([[1, 0], [2, 0]], dtype=torch.int32)
    cu, lens = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([6, 3], dtype=torch.int32)

    def step(k_pages: Tensor, v_pages: Tensor) -> Tensor:
        slots = torch.tensor([1, 10])
        turned_q, _ = ops.rope_append(q, k, v, cos, sin, k_pages, v_pages, slots)
        return ops.paged_attention(turned_q, k_pages, v_pages, table, cu, lens, 1, 6, scale=0.25)

    with ops.backend("triton"):
        caches = [[random(9, 3, 4, 2, 16), random(10, 3, 4, 2, 16)] for _ in range(2)]
        expected = step(*caches[0])
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(*caches[1])
    assert torch.equal(found, expected)
    for ours, theirs in zip(*caches, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}),
        ("mistral", {"sliding_window": 5, "head_dim": 16}),
        ("gpt2", {}),
    ],
)
def test_models_write_the_same_text(family: str, options: dict[str, Any]) -> None:
    model = model_of(small(family, **options), 0)
    ids = torch.tensor([[5, 9, 14, 33, 7, 21, 8], [0, 0, 0, 0, 4, 30, 12]])
    mask = (ids != 0).long()
    texts = []
    for backends in (("reference",), ("triton", "reference")):
        ops.explain(reset=True)
        with ops.backend(*backends):
            texts.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=8,
                    do_sample=False,
                    eos_token_id=[],
                    pad_token_id=0,
                )
            )
    assert torch.equal(*texts)
    assert texts[0].shape == (2, 15)
    ran = ops.explain()
    assert ran.backends("paged_attention") == {"triton"}
    assert ran.backends("append_kv" if family == "gpt2" else "rope_append") == {"triton"}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.slow
def test_a_model_on_an_int8_cache_is_near(backend: str) -> None:
    model = model_of(small("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=16), 0)
    ids = torch.randint(3, 41, (2, 12), generator=torch.Generator().manual_seed(0))
    logits, sizes = [], []
    with ops.backend(backend, "reference"), torch.inference_mode():
        for dtype in (None, torch.int8):
            cache = model.new_cache(2, dtype=dtype)
            model(ids[:, :9], past_key_values=cache)
            logits.append(model(ids[:, 9:], past_key_values=cache).logits)
            sizes.append(cache.nbytes())
    error = (logits[1] - logits[0]).abs().max()
    assert 0 < error < 0.02 * logits[0].std(), "0: it was not stored in 8 bits"
    assert sizes[1] == sizes[0] * (16 + 4) // (16 * 4)


def test_heads_of_a_program() -> None:
    device = CHIPS["sm_90"]
    for heads in range(1, 130, 3):
        for size in (1, 16, 64, 80, 128, 256):
            for tokens in (1, 8, 100, 5000):
                tile, warps = rope_block(heads, size, tokens, device)
                width = next_power_of_2(size)
                assert tile & (tile - 1) == 0
                assert tile * width <= 2048
                assert tile < 2 * heads
                assert warps in (1, 2, 4)
                assert warps == 1 or tile * width >= 8 * 32 * warps
                assert tile == 1 or tokens * -(-heads // tile) >= 2 * device.processors
    assert rope_block(32, 128, 512, device) == (16, 4)
    assert rope_block(9, 64, 512, device) == (16, 2)
    assert rope_block(32, 128, 8, device) == (1, 1), "256 programs of one head"


def test_int8_pages_want_scales() -> None:
    k, pages = torch.ones(1, 1, 4), torch.zeros(1, 2, 1, 4, dtype=torch.int8)
    slots, scales = torch.tensor([0]), torch.zeros(1, 2, 1)
    with pytest.raises(ValueError, match=r"append_kv: int8 pages need k_scales .* and k_scales is None"):
        ops.append_kv(k, k, pages, pages, slots)
    with pytest.raises(
        ValueError, match=r"pages are torch.float32, and k_scales is torch.float32 \[1, 2, 1\]"
    ):
        ops.append_kv(k, k, pages.float(), pages.float(), slots, scales, scales)
    for wrong in (scales.double(), torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)[:, :, :1]):
        with pytest.raises(ValueError, match=r"v_scales must be float32 \[1, 2, 1\].*, and is torch.float"):
            ops.append_kv(k, k, pages, pages, slots, scales, wrong)
    assert reference.quantise(k)[1].item() == pytest.approx(1 / 127)
