"""What may be done to a score (bias, ALiBi, soft-cap), and parts of the maps, against plain formulas."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from close import assert_as_good_as_eager, assert_close
from hypothesis import given
from hypothesis import strategies as st
from packed_sequences import Sequences, ends, random, sequences
from strategies import examples
from torch import Tensor

from minilm import ops
from minilm.ops.backends import native


def formula(case: Sequences, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """The maps in float64, one [H, Sq, Sk] a sequence, pair by pair."""
    q, k = q.double(), k.double()
    maps, q0, k0 = [], 0, 0
    for queries, keys in zip(case.queries, case.keys, strict=True):
        s = torch.full((q.shape[1], queries, keys), -math.inf, dtype=torch.float64)
        for h in range(q.shape[1]):
            for i in range(queries):
                for j in range(keys):
                    distance = i + keys - queries - j
                    if (case.causal and distance < 0) or abs(distance) >= (case.window or math.inf):
                        continue
                    score = 0.7 * float(q[q0 + i, h] @ k[k0 + j, h // case.group])
                    if options.get("soft_cap"):
                        score = options["soft_cap"] * math.tanh(score / options["soft_cap"])
                    if options.get("bias") is not None:
                        score += float(options["bias"][h, i, j])
                    if options.get("alibi_slopes") is not None:
                        score -= float(options["alibi_slopes"][h]) * abs(distance)
                    s[h, i, j] = score
        maps.append(s.softmax(-1))
        q0, k0 = q0 + queries, k0 + keys
    return maps


@st.composite
def options_for(draw: st.DrawFn, case: Sequences, dtype: torch.dtype) -> dict[str, Any]:
    heads = case.kv_heads * case.group
    longest = max(case.queries, default=0), max(case.keys, default=0)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        wide = random(case.seed + 3, heads, longest[0] + 1, 2 * (longest[1] + 1), dtype=dtype)
        options["bias"] = wide[:, :, ::2]
    if draw(st.booleans()):
        options["alibi_slopes"] = torch.rand(heads, generator=torch.Generator().manual_seed(case.seed))
    if draw(st.booleans()):
        options["soft_cap"] = draw(st.sampled_from([0.5, 3.0, 50.0]))
    return options


@examples(40)
@given(st.data(), sequences(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_attention(data: st.DataObject, case: Sequences, dtype: torch.dtype) -> None:
    options = data.draw(options_for(case, dtype))
    q, k, v = case.tensors(dtype)
    maps = formula(case, q, k, v, options)
    values = torch.split(v.double(), case.keys)
    parts = [
        torch.einsum("hij,jhd->ihd", p, x.repeat_interleave(case.group, 1))
        for p, x in zip(maps, values, strict=True)
    ]
    exact = torch.cat([q.double()[:0], *parts])

    def call(q: Tensor, k: Tensor, v: Tensor, op: Any = ops.attention) -> Any:
        return case.call(q, k, v, partial(op, **options))

    with ops.backend("reference"):
        eager = call(q, k, v)
        _, lse = call(q, k, v, ops.attention_with_lse)
    size = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
    unit = torch.finfo(dtype).eps
    assert_close(eager, exact, atol=64 * unit * size)
    if not options.keys() & {"alibi_slopes", "soft_cap"}:
        with ops.backend("torch"):
            assert_as_good_as_eager(call(q, k, v), eager, exact, floor=8 * unit * size)
    if native.unavailable is None and dtype == torch.float32 and options.keys() <= {"soft_cap"}:
        with ops.backend("native"):
            assert_as_good_as_eager(call(q, k, v), eager, exact, floor=32 * unit * size)
    found = ops.attention_probs(
        q, k, ends(case.queries), ends(case.keys), scale=0.7, causal=case.causal, window=case.window,
        heads=[-1], queries=slice(None, None, 2), lse=lse, **options,
    )  # fmt: skip
    for one, expected in zip(found, maps, strict=True):
        assert_close(one, expected[-1:, ::2], atol=64 * unit, what="a part of the map")


def test_a_part_of_the_maps() -> None:
    """Heads and queries by slices and by numbers, in any order; each is that part of the whole."""
    case = Sequences((4, 0, 2), (4, 3, 5), 2, 2, 3, True, 3, 0)
    q, k, _ = case.tensors(torch.float64)
    lengths = ends(case.queries), ends(case.keys)
    kind: dict[str, Any] = {"scale": 0.7, "causal": True, "window": 3}
    whole = ops.attention_probs(q, k, *lengths, **kind)
    for heads, queries in ((slice(1, 3), slice(-1, None)), ([3, 0], slice(0, 1)), ([2], slice(None))):
        for part, full in zip(
            ops.attention_probs(q, k, *lengths, **kind, heads=heads, queries=queries), whole, strict=True
        ):
            assert_close(part, full[heads][:, queries], atol=1e-14)
    with pytest.raises(IndexError, match="out of"):
        ops.attention_probs(q, k, *lengths, **kind, queries=[3])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("causal", "window"),
    [
        (True, 2),
        *(pytest.param(*kind, marks=pytest.mark.slow) for kind in ((True, None), (False, None), (False, 3))),
    ],
)
def test_the_bias_has_a_gradient(backend: str, causal: bool, window: int | None) -> None:
    case = Sequences((3, 1, 3), (4, 2, 3), 1, 2, 3, causal, window, 5)
    inputs = [*case.tensors(torch.float64), random(8, 2, 4, 4)]

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = case.call(q, k, v, partial(ops.attention, bias=bias))
        return out

    with ops.backend(backend):
        assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias of other heads": ({"bias": torch.ones(1, 4, 4)}, r"bias must be .*\[2, at least 4, .*\[1, 4, 4\]"),
    "bias too short": ({"bias": torch.ones(2, 4, 3)}, r"bias must be .*at least 4\].*\[2, 4, 3\]"),
    "bias of integers": ({"bias": torch.ones(2, 4, 4, dtype=torch.int64)}, "bias must be floating point"),
    "slopes of other heads": ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must be \[2\], and is \[3\]"),
    "a cap of nothing": ({"soft_cap": 0.0}, "soft_cap must be above 0, and is 0.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    options, message = REFUSED[name]
    case = Sequences((4,), (4,), 2, 1, 3, False, None, 0)
    with pytest.raises(ValueError, match=f"attention: {message}"):
        case.call(*case.tensors(torch.float32), partial(ops.attention, **options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"soft_cap": 2.0}, "no soft-cap"),
        ({"alibi_slopes": torch.ones(2)}, "no ALiBi"),
        ({"bias": torch.ones(2, 4, 4, dtype=torch.float64)}, "in torch.float32, and it is in torch.float64"),
    ],
)
def test_a_backend_that_cannot_says_so(options: dict[str, Any], reason: str) -> None:
    case = Sequences((4,), (4,), 2, 1, 3, False, None, 0)

    def call() -> Tensor:
        out: Tensor = case.call(*case.tensors(torch.float32), partial(ops.attention, **options))
        return out

    with ops.backend("torch"), pytest.raises(ops.BackendError, match=reason):
        call()
    with ops.backend("reference"):
        expected = call()
    assert_close(call(), expected, atol=1e-6)  # the automatic choice goes on to one that can
