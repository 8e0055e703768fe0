"""The ops against formulas written down for themselves in NumPy, element by element, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_as_good_as_eager, assert_close
from hypothesis import given
from hypothesis import strategies as st
from packed_sequences import Sequences, ends, exact, np_attention, random, sequences
from strategies import examples, seeds
from torch import Tensor

from minilm import ops
from minilm.config import ACTIVATIONS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def judge(actual: Tensor, expected: np.ndarray, *, terms: int = 1, what: str = "result") -> None:
    """An eager formula in the dtype of `actual`: a few roundings of numbers as large as the largest, and
    sums of `terms` terms in float32 at least."""
    unit = torch.finfo(actual.dtype).eps
    wide = min(unit, torch.finfo(torch.float32).eps)
    size = float(np.abs(expected).max()) if expected.size else 0.0
    assert_close(
        actual,
        torch.from_numpy(np.asarray(expected)),
        atol=(4 * unit + 2 * terms * wide) * max(size, 1.0),
        what=what,
    )


# --- formulas ---


def np_layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray | None, eps: float) -> np.ndarray:
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        row = x[index]
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        for i, value in enumerate(row):
            out[index][i] = (value - mean) / math.sqrt(variance + eps) * w[i] + (0.0 if b is None else b[i])
    return out


def np_rms_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        row = x[index]
        out[index] = row / math.sqrt(sum(value * value for value in row) / len(row) + eps) * w
    return out


def np_rope(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Complex numbers turned: the pair (i, i + D/2) is one of them. x [T, H, D], angle [T, D/2]."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


FORMULAS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_10": lambda x: min(max(FORMULAS["gelu"](x), -10), 10),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "hardswish": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "linear": lambda x: x,
}
FORMULAS |= {
    **dict.fromkeys(("gelu_python",), FORMULAS["gelu"]),
    **dict.fromkeys(
        ("gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), FORMULAS["gelu_new"]
    ),
    "swish": FORMULAS["silu"],
}


# --- normalisation, rope, pointwise ---

LEADING = st.sampled_from([(), (0,), (1,), (5,), (2, 3)])


@examples(40)
@given(
    LEADING,
    st.integers(1, 33),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([1e-12, 1e-5, 0.3]),
    seeds(),
)
def test_norms(
    leading: tuple[int, ...], C: int, dtype: torch.dtype, bias: bool, eps: float, seed: int
) -> None:
    if C < 3 and eps < 1e-3 and dtype != torch.float64:
        eps = 0.3  # two channels may be as good as equal, and the result would be all rounding
    x, residual = random(seed, *leading, C, dtype=dtype), random(seed + 1, *leading, C, dtype=dtype)
    w, b = random(seed + 2, C, dtype=dtype), random(seed + 3, C, dtype=dtype) if bias else None
    b64 = None if b is None else exact(b)
    with ops.backend("reference"):
        judge(ops.layer_norm(x, w, b, eps), np_layer_norm(exact(x), exact(w), b64, eps), terms=8 * C)
        judge(ops.rms_norm(x, w, eps), np_rms_norm(exact(x), exact(w), eps), terms=8 * C)
        y, total = ops.add_layer_norm(x, residual, w, b, eps)
        z, total_again = ops.add_rms_norm(x, residual, w, eps)
    assert torch.equal(total, x + residual)
    assert torch.equal(total_again, x + residual)
    judge(y, np_layer_norm(exact(total), exact(w), b64, eps), terms=8 * C)
    judge(z, np_rms_norm(exact(total), exact(w), eps), terms=8 * C)
    assert y.dtype == z.dtype == total.dtype == dtype


@examples(25)
@given(
    st.integers(0, 6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from(DTYPES),
    seeds(),
)
def test_rope(T: int, kv_heads: int, group: int, half: int, dtype: torch.dtype, seed: int) -> None:
    q = random(seed, T, kv_heads * group, 2 * half, dtype=dtype)
    k = random(seed + 1, T, kv_heads, 2 * half, dtype=dtype)
    angle = random(seed + 2, T, half) * 20
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = ops.rope(q, k, angle.cos().to(wide), angle.sin().to(wide))
    judge(a, np_rope(exact(q), exact(angle)))
    judge(b, np_rope(exact(k), exact(angle)))
    assert a.dtype == b.dtype == dtype


def test_rope_depends_on_the_distance_alone() -> None:
    q, k, frequency = (
        random(0, 1, 1, 8),
        random(1, 1, 1, 8),
        torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64),
    )

    def product(i: int, j: int) -> float:
        turned = [
            ops.rope(x, x, (p * frequency)[None].cos(), (p * frequency)[None].sin())[0]
            for x, p in ((q, i), (k, j))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(5, 2) == pytest.approx(product(105, 102), abs=1e-12)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3


def test_every_activation_has_a_formula_and_a_name_in_the_configuration() -> None:
    assert set(FORMULAS) == set(ops.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-12, 12, 97, dtype=torch.float64), torch.tensor([0.0, 1e-4, -1e-4])]).to(
        dtype
    )
    expected = np.array([FORMULAS[name](value) for value in exact(x)])
    with ops.backend("reference"):
        actual = ops.linear(x[:, None], torch.ones(1, 1, dtype=dtype), None, name)[:, 0]
        judge(actual, expected, what=name)
        up = random(0, *x.shape, dtype=dtype)
        gated = ops.gated(torch.stack([x, up], dim=1), name)[:, 0]
    judge(gated, expected * exact(up), what=f"gated {name}")


@examples(25)
@given(LEADING, st.integers(1, 20), st.integers(1, 20), st.booleans(), st.sampled_from(DTYPES), seeds())
def test_linear(
    leading: tuple[int, ...], inner: int, outer: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    x, w = random(seed, *leading, inner, dtype=dtype), random(seed + 1, outer, inner, dtype=dtype)
    b = random(seed + 2, outer, dtype=dtype) if bias else None
    expected = np.zeros((*leading, outer)) + (0.0 if b is None else exact(b))
    for i in range(inner):
        expected = expected + exact(x)[..., i : i + 1] * exact(w)[:, i]
    judge(ops.linear(x, w, b), expected, terms=inner)
    assert ops.linear(x, w, b).dtype == dtype


@examples(25)
@given(
    st.integers(1, 9), st.integers(1, 30), st.sampled_from([-100, -1, 3]), st.sampled_from(DTYPES), seeds()
)
def test_cross_entropy(T: int, V: int, ignored: int, dtype: torch.dtype, seed: int) -> None:
    logits = random(seed, T, V, dtype=dtype) * 3
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(random(seed, T) > 0.5, ignored, labels)
    losses = []
    for row, label in zip(exact(logits), labels.tolist(), strict=True):
        if label != ignored:
            losses.append(math.log(sum(math.exp(value) for value in row)) - row[label])
    loss = ops.cross_entropy(logits, labels, ignored)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if losses:
        judge(loss, np.array(sum(losses) / len(losses)), terms=V + T)
    else:
        assert loss.isnan()


# --- attention ---


@examples(60)
@given(sequences(), st.sampled_from(DTYPES))
def test_attention(case: Sequences, dtype: torch.dtype) -> None:
    q, k, v = case.tensors(dtype)
    expected, lse, maps = case.formula(q, k, v)
    with ops.backend("reference"):
        out = case.call(q, k, v)
        again, found_lse = case.call(q, k, v, ops.attention_with_lse)
    assert torch.equal(out, again)
    assert out.dtype == dtype
    # Scores are products of q and k, rounded to the dtype: the exponential makes that error relative.
    terms = 8 * case.size if dtype in (torch.float64, torch.float32) else 0
    unit = torch.finfo(dtype).eps
    spread = 4 * math.sqrt(case.size)
    assert_close(out, torch.from_numpy(expected), atol=(spread + terms) * unit * 4, what="result")
    assert found_lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found_lse, torch.from_numpy(lse), atol=(spread + terms) * unit * 4, what="log-sum-exp")
    probabilities = ops.attention_probs(
        q, k, ends(case.queries), ends(case.keys), scale=0.7, causal=case.causal, window=case.window
    )
    for found, wanted in zip(probabilities, maps, strict=True):
        assert_close(found, torch.from_numpy(wanted), atol=(spread + terms) * unit * 2, what="probabilities")


@examples(60)
@given(sequences(), st.sampled_from(DTYPES))
def test_fused_attention_is_as_good_as_eager(case: Sequences, dtype: torch.dtype) -> None:
    """PyTorch's kernels, on every grouping of equal lengths."""
    q, k, v = case.tensors(dtype)
    expected, _, _ = case.formula(q, k, v)
    with ops.backend("torch", linear="reference"):
        fused = case.call(q, k, v)
    with ops.backend("reference"):
        eager = case.call(q, k, v)
    floor = 4 * torch.finfo(dtype).eps * max(float(np.abs(expected).max()) if expected.size else 0.0, 1.0)
    assert_as_good_as_eager(fused, eager, torch.from_numpy(expected), floor=floor)


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "torch"])
def test_gradients_of_attention(backend: str) -> None:
    for causal, window in ((True, None), (False, None), (True, 2), (False, 3)):
        case = Sequences((3, 1, 3), (4, 2, 3), 1, 2, 3, causal, window, 5)
        inputs = [x.requires_grad_() for x in case.tensors(torch.float64)]
        with ops.backend(backend):
            assert torch.autograd.gradcheck(case.call, inputs)


@pytest.mark.parametrize(
    "op", ["layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "rope", "linear", "gated"]
)
def test_gradients_of_the_reference(op: str) -> None:
    """Against differences of the function itself."""
    a, b, w, c = (random(i, *shape).requires_grad_() for i, shape in enumerate(((3, 5), (3, 5), (5,), (5,))))
    with ops.backend("reference"):
        if op == "rope":
            q, k = random(0, 2, 2, 4).requires_grad_(), random(1, 2, 1, 4).requires_grad_()
            angle = random(2, 2, 2)
            assert torch.autograd.gradcheck(lambda q, k: ops.rope(q, k, angle.cos(), angle.sin()), (q, k))
        elif op == "linear":
            m, bias = random(5, 4, 5).requires_grad_(), random(6, 4).requires_grad_()
            assert torch.autograd.gradcheck(lambda x, m, b: ops.linear(x, m, b, "gelu"), (a, m, bias))
        elif op == "gated":
            x = random(7, 3, 6).requires_grad_()
            assert torch.autograd.gradcheck(lambda x: ops.gated(x, "silu"), (x,))
        elif op == "layer_norm":
            assert torch.autograd.gradcheck(lambda x, w, c: ops.layer_norm(x, w, c, 0.1), (a, w, c))
        elif op == "rms_norm":
            assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 0.1), (a, w))
        elif op == "add_layer_norm":
            assert torch.autograd.gradcheck(
                lambda x, y, w, c: ops.add_layer_norm(x, y, w, c, 0.1), (a, b, w, c)
            )
        else:
            assert torch.autograd.gradcheck(lambda x, y, w: ops.add_rms_norm(x, y, w, 0.1), (a, b, w))


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "torch"])
def test_dropout_of_attention_keeps_the_mean(backend: str) -> None:
    """A third of the probabilities is dropped, and the rest scaled up: the mean over many draws is the plain
    result."""
    case = Sequences((2,) * 3000, (5,) * 3000, 1, 1, 4, False, None, 0)
    q, k, v = (x[: len(x) // 3000].repeat(3000, 1, 1) for x in case.tensors(torch.float32))
    torch.manual_seed(0)
    with ops.backend(backend):
        plain = case.call(q, k, v)[:2]
        dropped = ops.attention(
            q, k, v, ends(case.queries), ends(case.keys), 2, 5, scale=0.7, causal=False, dropout_p=1 / 3
        ).view(3000, 2, 1, 4)
    assert_close(dropped.mean(0), plain, atol=6 * float(dropped.std(0).max()) / 3000**0.5)
    assert float(dropped.std(0).min()) > 0.01


# --- the paged cache ---


@st.composite
def paged(draw: st.DrawFn) -> tuple[Sequences, int]:
    """Causal sequences of at least one new token, and a page size."""
    pairs = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 7)), min_size=1, max_size=4))
    case = Sequences(
        tuple(n for n, _ in pairs),
        tuple(n + past for n, past in pairs),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
        True,
        draw(st.none() | st.integers(1, 6)),
        draw(seeds()),
    )
    return case, draw(st.integers(1, 5))


@examples(50)
@given(paged(), st.sampled_from(DTYPES), st.sampled_from(["reference", "torch"]))
def test_paged_attention(drawn: tuple[Sequences, int], dtype: torch.dtype, backend: str) -> None:
    """Pages in any order, with NaN wherever no token of a sequence is: nothing of it is read."""
    case, page_size = drawn
    q, k, v = case.tensors(dtype)
    expected, _, _ = case.formula(q, k, v)
    needed = [-(-n // page_size) for n in case.keys]
    order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(case.seed)).tolist()
    shape = (sum(needed) + 2, page_size, case.kv_heads, case.size)
    k_pages, v_pages = torch.full(shape, math.nan, dtype=dtype), torch.full(shape, math.nan, dtype=dtype)
    table = torch.zeros(len(needed), max(needed) + 1, dtype=torch.int32)
    slots = []
    for row, count in enumerate(needed):
        own = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(own, dtype=torch.int32)
        slots += [own[t // page_size] * page_size + t % page_size for t in range(case.keys[row])]
    ops.append_kv(k, v, k_pages, v_pages, torch.tensor(slots))
    for index, slot in enumerate(slots):
        page, offset = divmod(slot, page_size)
        assert torch.equal(k_pages[page, offset], k[index])
        assert torch.equal(v_pages[page, offset], v[index])
    assert int(k_pages.isfinite().any(-1).any(-1).sum()) == len(slots)
    lens = torch.tensor(case.keys, dtype=torch.int32)
    with ops.backend(backend, append_kv="reference"):
        out = ops.paged_attention(
            q,
            k_pages,
            v_pages,
            table,
            ends(case.queries),
            lens,
            max(case.queries),
            max(case.keys),
            scale=0.7,
            window=case.window,
        )
    with ops.backend("reference"):
        eager = case.call(q, k, v)
    floor = 4 * torch.finfo(dtype).eps * max(float(np.abs(expected).max()), 1.0)
    assert_as_good_as_eager(out, eager, torch.from_numpy(expected), floor=floor)


def test_rope_append_is_rope_and_append() -> None:
    q, k, v, angle = random(0, 5, 4, 6), random(1, 5, 2, 6), random(2, 5, 2, 6), random(3, 5, 3)
    pages = [torch.zeros(4, 3, 2, 6, dtype=torch.float64) for _ in range(4)]
    slots = torch.tensor([4, 0, 11, 7, 2])
    a, b = ops.rope_append(q, k, v, angle.cos(), angle.sin(), pages[0], pages[1], slots)
    c, d = ops.rope(q, k, angle.cos(), angle.sin())
    ops.append_kv(d, v, pages[2], pages[3], slots)
    for one, other in ((a, c), (b, d), (pages[0], pages[2]), (pages[1], pages[3])):
        assert torch.equal(one, other)
    assert torch.equal(pages[1].view(-1, 2, 6)[slots], v)


def test_cache_may_be_narrower_than_the_tokens() -> None:
    """float32 tokens in a bfloat16 cache: stored rounded, computed with as the queries are."""
    k, v, q = random(0, 3, 1, 4).float(), random(1, 3, 1, 4).float(), random(2, 3, 2, 4).float()
    pages = [torch.zeros(1, 4, 1, 4, dtype=torch.bfloat16) for _ in range(2)]
    ops.append_kv(k, v, *pages, torch.tensor([0, 1, 2]))
    lens, cu = torch.tensor([3], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    out = ops.paged_attention(q, *pages, torch.zeros(1, 1, dtype=torch.int32), cu, lens, 3, 3, scale=1.0)
    expected, _, _ = np_attention(exact(q), exact(k.bfloat16()), exact(v.bfloat16()), 1.0, True, None)
    judge(out, expected, terms=12)


# --- refusals ---

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "weight of another size": (
        lambda: ops.layer_norm(torch.ones(2, 5), torch.ones(4), None, 1e-5),
        r"layer_norm: weight .*5.*\[4\]",
    ),
    "bias of another size": (
        lambda: ops.layer_norm(torch.ones(2, 5), torch.ones(5), torch.ones(1), 1e-5),
        r"layer_norm: bias .*5.*\[1\]",
    ),
    "scalar": (lambda: ops.rms_norm(torch.tensor(1.0), torch.ones(1), 1e-5), "rms_norm: .*scalar"),
    "sum of two shapes": (
        lambda: ops.add_layer_norm(torch.ones(2, 5), torch.ones(1, 5), torch.ones(5), None, 1e-5),
        r"add_layer_norm: x \[2, 5\] and residual \[1, 5\]",
    ),
    "sum of two shapes, rms": (
        lambda: ops.add_rms_norm(torch.ones(2, 5), torch.ones(5), torch.ones(5), 1e-5),
        r"add_rms_norm: x \[2, 5\] and residual \[5\]",
    ),
    "matrix of another size": (
        lambda: ops.linear(torch.ones(2, 5), torch.ones(3, 4)),
        r"linear: .*5.*\[3, 4\].*4",
    ),
    "q is flat": (lambda: attend((4, 8), (4, 2, 4), (4, 2, 4)), r"attention: q .*\[4, 8\]"),
    "k and v differ": (
        lambda: attend((4, 2, 4), (4, 2, 4), (5, 2, 4)),
        r"attention: k \[4, 2, 4\] and v \[5, 2, 4\]",
    ),
    "head sizes differ": (lambda: attend((4, 2, 6), (4, 2, 4), (4, 2, 4)), "attention: .*6.*4"),
    "heads that do not divide": (
        lambda: attend((4, 3, 4), (4, 2, 4), (4, 2, 4)),
        "attention: 3 query heads .*2 key",
    ),
    "lengths that do not add up": (
        lambda: attend((4, 2, 4), (4, 2, 4), (4, 2, 4), cu=[0, 3]),
        r"attention: cu_seqlens_q .*4.*\[0, 3\]",
    ),
    "lengths that fall": (
        lambda: attend((4, 2, 4), (4, 2, 4), (4, 2, 4), cu=[0, 5, 4]),
        r"attention: cu_seqlens_q .*\[0, 5, 4\]",
    ),
    "lengths of another type": (
        lambda: attend((4, 2, 4), (4, 2, 4), (4, 2, 4), dtype=torch.int64),
        "attention: cu_seqlens_q must be int32 .*int64",
    ),
    "numbers of sequences differ": (
        lambda: ops.attention(
            *[torch.ones(4, 2, 4)] * 3, ends((4,)), ends((2, 2)), 4, 2, scale=1.0, causal=False
        ),
        "attention: 1 sequences .*2",
    ),
    "tables of other sequences": (
        lambda: ops.paged_attention(
            torch.ones(1, 2, 4),
            torch.ones(2, 3, 2, 4),
            torch.ones(2, 3, 2, 4),
            torch.zeros(2, 1, dtype=torch.int32),
            ends((1,)),
            torch.ones(1, dtype=torch.int32),
            1,
            1,
            scale=1.0,
        ),
        r"paged_attention: block_table \[2, 1\], context_lens \[1\]",
    ),
}


def attend(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    *,
    cu: Any = None,
    dtype: torch.dtype = torch.int32,
) -> Tensor:
    lengths = torch.tensor([0, 4] if cu is None else cu, dtype=dtype)
    return ops.attention(
        torch.ones(q), torch.ones(k), torch.ones(v), lengths, lengths, 4, 4, scale=1.0, causal=True
    )


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_that_do_not_fit(name: str) -> None:
    """A ValueError that names the op and both values."""
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


REFUSED_MORE: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown activation": (
        lambda: ops.linear(torch.ones(1, 2), torch.ones(2, 2), None, "prelu"),
        "activation 'prelu'",
    ),
    "odd row to gate": (lambda: ops.gated(torch.ones(2, 5), "silu"), r"gated: .*\[2, 5\]"),
    "linear bias": (
        lambda: ops.linear(torch.ones(2, 5), torch.ones(3, 5), torch.ones(1)),
        r"linear: bias .*3.*\[1\]",
    ),
    "angles of other tokens": (
        lambda: ops.rope(torch.ones(3, 2, 4), torch.ones(3, 1, 4), torch.ones(1, 2), torch.ones(1, 2)),
        r"rope: cos .*\[3, 2\].*\[1, 2\]",
    ),
    "angles of another head size": (
        lambda: ops.rope(torch.ones(3, 2, 4), torch.ones(3, 1, 4), torch.ones(3, 1), torch.ones(3, 1)),
        r"rope: cos .*\[3, 2\].*\[3, 1\]",
    ),
    "odd head size": (
        lambda: ops.rope(torch.ones(3, 2, 5), torch.ones(3, 1, 5), torch.ones(3, 2), torch.ones(3, 2)),
        "rope: .*5",
    ),
    "slots of other tokens": (
        lambda: ops.append_kv(
            *[torch.ones(3, 1, 4)] * 2, *[torch.ones(2, 2, 1, 4)] * 2, torch.tensor([0, 1])
        ),
        r"append_kv: slots .*3.*\[2\]",
    ),
    "pages of another head size": (
        lambda: ops.append_kv(*[torch.ones(1, 1, 4)] * 2, *[torch.ones(2, 2, 1, 1)] * 2, torch.tensor([0])),
        r"append_kv: k \[1, 1, 4\] .*\[2, 2, 1, 1\]",
    ),
    "labels of other tokens": (
        lambda: ops.cross_entropy(torch.ones(3, 4), torch.tensor([1, 2])),
        "cross_entropy: .*3.*2",
    ),
    "window of nothing": (
        lambda: ops.attention(
            *[torch.ones(4, 2, 4)] * 3, ends((4,)), ends((4,)), 4, 4, scale=1.0, causal=True, window=0
        ),
        "attention: window .*0",
    ),
    "more queries than keys": (
        lambda: ops.attention(
            torch.ones(4, 2, 4),
            *[torch.ones(3, 2, 4)] * 2,
            ends((4,)),
            ends((3,)),
            4,
            3,
            scale=1.0,
            causal=True,
        ),
        "attention: .*4 queries and only 3 keys",
    ),
}


@pytest.mark.parametrize("name", REFUSED_MORE)
def test_arguments_that_would_be_broadcast_or_misread(name: str) -> None:
    call, message = REFUSED_MORE[name]
    with pytest.raises(ValueError, match=message):
        call()
