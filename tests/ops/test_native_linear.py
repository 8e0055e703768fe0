"""Linear layers on packed weights: against float64, bit by bit where results must not depend on something,
and what the ops refuse. The functions of csrc/cpu/math.h are measured through them."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from close import assert_as_good_as_eager
from hypothesis import given
from hypothesis import strategies as st
from native_runs import (
    OTHER_ISAS,
    at_the_end,
    examples,
    guarded,
    passes_with,
    random,
    require_extension,
    with_threads,
)
from torch import Tensor, nn

from minilm import ops
from minilm.ops import reference
from minilm.ops.backends import native, packed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES: dict[int, str] = {
    0: "linear",
    1: "gelu",
    2: "gelu_new",
    3: "silu",
    4: "relu",
    5: "quick_gelu",
    6: "tanh",
}
"""An activation of each of the kernels' numbers."""
PANEL = packed.panel_width() if native.unavailable is None else 8
SIZES = (1, 2, 7, 31, 61, 127, PANEL - 1, PANEL, PANEL + 1, 3 * PANEL - 1)


@pytest.fixture(autouse=True)
def _extension_is_there() -> None:
    require_extension()


def apply(x: Tensor, made: packed.Packed, activation: int = 0, gated: bool = False) -> Tensor:
    y: Tensor = torch.ops.minilm.packed_linear(
        x, made.data, made.format, made.columns, made.places, activation, gated
    )
    return y


def expected(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, gated: bool, dtype: torch.dtype
) -> Tensor:
    y = reference.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), None)
    function = reference.ACTIVATIONS[NAMES[activation]]
    if not gated:
        return function(y)
    gate, up = y.chunk(2, dim=-1)
    return function(gate) * up


def rounding(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> float:
    """What one rounding of the largest sum amounts to in the result: eager may be exact by luck."""
    size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    if gated:
        gate, up = size.chunk(2, dim=-1)
        size = 2 * gate * up
    return 2 * torch.finfo(torch.float32).eps * float(size.max())


@examples(150)
@given(
    rows=st.integers(1, 40),
    inputs=st.sampled_from(SIZES),
    outputs=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    activation=st.sampled_from(sorted(NAMES)),
    gated=st.booleans(),
    mean=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 2**20),
)
def test_the_layer_is_close(
    rows: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    with_bias: bool,
    activation: int,
    gated: bool,
    mean: float,
    seed: int,
) -> None:
    x = (random(rows, inputs, seed=seed) + mean).to(dtype).float()  # as the op gives it
    weight = random(outputs * (1 + gated), inputs, seed=seed + 1, dtype=dtype)
    bias = random(len(weight), seed=seed + 2, dtype=dtype) if with_bias else None
    made = packed.pack(weight, bias, gated=gated)
    assert made.columns == outputs
    arguments = x, weight, bias, activation, gated
    assert_as_good_as_eager(
        apply(x, made, activation, gated),
        expected(*arguments, torch.float32),
        expected(*arguments, torch.float64),
        floor=rounding(x, weight, bias, gated),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_are_close(dtype: torch.dtype) -> None:
    """Of more inputs than are added up at a time, all of one sign."""
    x, weight = (random(n, 3001, seed=n, dtype=dtype).abs() + 1 for n in (14, PANEL + 1))
    x = x.float()
    assert_as_good_as_eager(
        apply(x, packed.pack(weight, None)), x @ weight.float().T, x.double() @ weight.double().T
    )


@examples(60)
@given(
    leading=st.sampled_from([(), (1,), (3,), (2, 3), (0,), (17,)]),
    inputs=st.sampled_from(SIZES),
    outputs=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    activation=st.none() | st.sampled_from(sorted(n for n in packed.ACTIVATIONS if n is not None)),
    layout=st.sampled_from(["contiguous", "every other", "transposed"]),
    seed=st.integers(0, 2**20),
)
def test_the_op_is_close_in_every_dtype_and_layout(
    leading: tuple[int, ...],
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    with_bias: bool,
    activation: str | None,
    layout: str,
    seed: int,
) -> None:
    x = random(*leading, inputs, seed=seed, dtype=dtype)
    weight = nn.Parameter(random(outputs, inputs, seed=seed + 1, dtype=dtype) / inputs**0.5)
    bias = nn.Parameter(random(outputs, seed=seed + 2, dtype=dtype)) if with_bias else None
    if layout == "every other":
        x = torch.stack((x, x + 1), dim=-1)[..., 0]
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
        weight = nn.Parameter(weight.detach().T.contiguous().T)
    with torch.no_grad():
        with ops.backend("native"):
            y = ops.linear(x, weight, bias, activation)
        wide = [None if t is None else t.double() for t in (x, weight, bias)]
        assert_as_good_as_eager(
            y,
            reference.linear(x, weight, bias, activation),
            reference.linear(*wide, activation),  # type: ignore[arg-type]
            floor=2 * torch.finfo(dtype).eps * float(wide[0].abs().amax() + 3) if y.numel() else 0.0,  # type: ignore[union-attr]
        )


def patterns(step: int) -> Tensor:
    """Every `step`-th of all float32 bit patterns, and the numbers that are special."""
    numbers = torch.arange(-(2**31), 2**31, step).to(torch.int32).view(torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    inf, nan = float("inf"), float("nan")
    special = [0.0, -0.0, inf, -inf, nan, tiny, -tiny, tiny / 8, -1e-45, 3.4e38, -3.4e38, 88.72, -88.72]
    return torch.cat((numbers, torch.tensor(special), torch.linspace(-100, 100, 100003)))


def activated(activation: int, x: Tensor) -> Tensor:
    """activation(x), in the first lane; the others have computed the same."""
    y = apply(x[:, None], packed.pack(torch.ones(PANEL, 1), None), activation)
    torch.testing.assert_close(y, y[:, :1].expand_as(y), rtol=0, atol=0, equal_nan=True)
    return y[:, 0]


def test_what_bfloat16_weights_meet_is_x_or_x_rounded() -> None:
    """To the nearest bfloat16, ties to even, where the instruction set multiplies bfloat16 with bfloat16."""
    between = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    x = torch.cat((patterns(1 << 14), between))
    y = apply(x[:, None], packed.pack(torch.ones(PANEL, 1, dtype=torch.bfloat16), None))
    if native.cpu_isa() == "avx512_bf16":
        x = torch.where(x.abs() < torch.finfo(torch.float32).tiny, 0.0, x.bfloat16().float())
    torch.testing.assert_close(y, x[:, None].expand_as(y), rtol=0, atol=0, equal_nan=True)


BOUNDS: dict[int, float] = {0: 0.0, 1: 2.5e-7, 2: 2e-7, 3: 4e-7, 4: 0.0, 5: 2e-7, 6: 1e-6}
"""Errors of the activation functions, relative to |x|; of silu and tanh, to the result (csrc/cpu/math.h
states them)."""


@pytest.mark.parametrize("activation", sorted(NAMES))
def test_activation_functions_keep_their_error_bounds(activation: int) -> None:
    x = patterns(1 << 14)
    y = activated(activation, x)
    exact = exactly(activation, x.double())
    assert y[x.isnan()].isnan().all()
    assert (y[x == torch.inf] == (1.0 if NAMES[activation] == "tanh" else torch.inf)).all()
    if activation:  # where the limit is 0, -inf * 0 is NaN
        lowest = -1.0 if NAMES[activation] == "tanh" else 0.0
        assert (y[x == -torch.inf].nan_to_num(nan=0.0) == lowest).all()

    finite = x.isfinite()
    x, y, exact = x[finite].double(), y[finite].double(), exact[finite]
    size = exact.abs() if NAMES[activation] in ("silu", "tanh") else x.abs()
    error = (y - exact).abs() / size.clamp(min=1e-38)
    assert not error.isnan().any()
    error[(y - exact).abs() < 3e-37] = 0  # exp overflows, or there are no more digits
    print(f"{NAMES[activation]}: {error.max():.3g} at {x[error.argmax()]}")
    assert error.max() <= BOUNDS[activation]


def exactly(activation: int, x: Tensor) -> Tensor:
    """The activation in float64, by formulas that keep the relative precision of the left tail."""
    if activation == 1:
        return x * torch.special.erfc(-x / 2**0.5) / 2
    if activation == 2:
        return x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return reference.ACTIVATIONS[NAMES[activation]](x)


def test_exp2_keeps_its_error_bound() -> None:
    """Attention to two keys whose scores are 0 and -d log(2) gives 2^-d itself where 1 + 2^-d rounds to 1."""
    d = torch.linspace(25.0, 140.0, 1 << 19)
    q, k, v = (
        d[:, None, None],
        torch.tensor([0.0, -1.0])[:, None, None],
        torch.tensor([0.0, 1.0])[:, None, None],
    )
    q_ends, k_ends = (torch.tensor([0, n], dtype=torch.int32) for n in (len(d), 2))
    y = torch.ops.minilm.attention(q, k, v, q_ends, k_ends, math.log(2), False, None).flatten()
    exact = (-d.double()).exp2()
    normal = d < 124.9
    error = ((y.double() - exact) / exact).abs()[normal]
    print(f"exp2: {error.max():.3g} at {-d[normal][error.argmax()]}")
    assert error.max() < 1.5e-7
    assert (y[d > 125.1] <= 2.0**-124).all()
    assert (y[d > 125.1] >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_does_not_depend_on_batch_or_threads(dtype: torch.dtype, gated: bool) -> None:
    rows, inputs, outputs = 41, 77, 4 * PANEL + 3
    x = random(rows, inputs, seed=0)
    weight = random(outputs * (1 + gated), inputs, seed=1, dtype=dtype)
    made = packed.pack(weight, random(len(weight), seed=2, dtype=dtype), gated=gated)
    whole = apply(x, made, 1, gated)
    for other in with_threads(lambda: apply(x, made, 1, gated)):
        assert torch.equal(other, whole)
    for count in (1, 2, 3, 5, 6, 7, 11, 12, 13, 25):
        for first in (0, rows - count):
            part = x[first : first + count].contiguous()
            assert torch.equal(apply(part, made, 1, gated), whole[first : first + count]), (first, count)
    some = weight[: PANEL - 1] if not gated else torch.cat((weight[:5], weight[outputs : outputs + 5]))
    alone = apply(x, packed.pack(some.contiguous(), None, gated=gated), 0, gated)
    full = apply(x, packed.pack(weight, None, gated=gated), 0, gated)
    assert torch.equal(alone, full[:, : alone.shape[1]]), "an output depends on the others"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row_and_column(dtype: torch.dtype) -> None:
    x, weight = random(9, 21, seed=0), random(PANEL + 5, 21, seed=1, dtype=dtype)
    clean = apply(x, packed.pack(weight, None))
    x[3, 7], x[5, 0], weight[2, 20] = float("nan"), float("inf"), float("nan")
    y = apply(x, packed.pack(weight, None))
    assert y[3].isnan().all()
    assert y[:, 2].isnan().all()
    assert not y[5, torch.arange(PANEL + 5) != 2].isfinite().any()
    rows = torch.tensor([r for r in range(9) if r not in (3, 5)])
    columns = torch.tensor([c for c in range(PANEL + 5) if c != 2])
    assert torch.equal(y[rows][:, columns], clean[rows][:, columns])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_the_last_element_is_read(dtype: torch.dtype) -> None:
    for rows, inputs, outputs in ((1, 1, 1), (1, 5, 3), (7, 33, PANEL + 1), (13, 3, PANEL)):
        x, weight = random(rows, inputs, seed=0), random(outputs, inputs, seed=1, dtype=dtype)
        made = packed.pack(weight, weight[:, 0].contiguous())
        y = apply(x, made)
        with guarded(made.data.numel()) as memory:
            assert torch.equal(apply(x, made._replace(data=at_the_end(memory, made.data))), y)
        with guarded(x.nbytes) as memory:
            assert torch.equal(apply(at_the_end(memory, x), made), y)
        with guarded(weight.nbytes) as memory:
            again = packed.pack(at_the_end(memory, weight), weight[:, 0].contiguous())
            assert torch.equal(again.data, made.data)


# The packed copies that are kept


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(5, 3, seed=0))
        self.bias = nn.Parameter(random(5, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, "gelu")


def write_in_place(layer: Layer) -> None:
    layer.weight[2, 1] += 1


def write_bias(layer: Layer) -> None:
    layer.bias *= 2


def step(layer: Layer) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.5).step()


def load(layer: Layer) -> None:
    layer.load_state_dict({"weight": random(5, 3, seed=8), "bias": random(5, seed=9)})


def exchange(layer: Layer) -> None:
    layer.weight = nn.Parameter(random(5, 3, seed=7))


def exchange_data(layer: Layer) -> None:
    layer.weight.data = random(5, 3, seed=6)


@pytest.mark.parametrize(
    "change", [write_in_place, write_bias, step, load, exchange, exchange_data], ids=lambda f: f.__name__
)
def test_a_changed_weight_is_packed_anew(change: Any) -> None:
    layer, x = Layer(), random(4, 3, seed=3)
    with torch.no_grad(), ops.backend("native"):
        before = layer(x)
        assert torch.equal(layer(x), before)
        change(layer)
        after = layer(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, reference.linear(x, layer.weight, layer.bias, "gelu"))


def test_a_packed_copy_is_made_once_and_goes_with_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    packs = []
    pack = packed.pack
    monkeypatch.setattr(packed, "pack", lambda *a, **o: packs.append(1) or pack(*a, **o))
    layer, x = Layer(), random(4, 3, seed=3)
    gc.collect()
    held = len(packed._kept)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert len(packs) == 1
    assert len(packed._kept) == held + 1
    del layer
    gc.collect()
    assert len(packed._kept) == held


def test_what_the_packed_layer_refuses_goes_elsewhere_with_the_reason() -> None:
    x, weight = random(2, 3, seed=0), nn.Parameter(random(4, 3, seed=1))
    cases: list[tuple[str, Any]] = [
        ("no derivative", lambda: ops.linear(x, weight)),
        ("only parameters are packed", lambda: ops.linear(x, weight.detach())),
        ("activation mish", lambda: ops.linear(x, weight.requires_grad_(False), None, "mish")),
        ("no kernel for torch.float64", lambda: ops.linear(x.double(), nn.Parameter(weight.double()))),
        ("no kernel for meta", lambda: ops.linear(x.to("meta"), nn.Parameter(weight.to("meta")))),
    ]
    for reason, call in cases:
        with ops.backend("native"), pytest.raises(ops.BackendError, match=reason):
            call()
        weight.requires_grad_()
    ops.explain(reset=True)
    ops.linear(x, weight).sum().backward()
    assert weight.grad is not None
    (decision,) = ops.explain().decisions
    assert decision.refused["native"] == "the packed kernels have no derivative"


def test_a_compiled_function_is_traced_whatever_ran_before() -> None:
    """The packed copy is kept beside the weight, which a graph knows nothing of."""
    layer, x = Layer().requires_grad_(False), random(4, 3, seed=3)
    eager = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), eager)
    layer.weight.mul_(2)
    torch.testing.assert_close(compiled(x), reference.linear(x, layer.weight, layer.bias, "gelu"))
    ops.explain(reset=True)
    layer(x)
    assert ops.explain().backends("linear") == {"native"}


# What the raw ops refuse


def pack_arguments(**changed: Any) -> list[Any]:
    good: dict[str, Any] = {
        "values": random(5, 3, seed=0),
        "scales": None,
        "minimums": None,
        "bias": random(5, seed=1),
        "order": packed.places(5, False),
        "format": 0,
        "in_features": 3,
    }
    return list({**good, **changed}.values())


WRONG_ORDER = {
    "below -1": -2,
    "a row that is not there": 5,
    "far away": 2**31 - 1,
}
BAD_PACKS: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": 6}, "unknown weight format 6"),
    "negative format": ({"format": -1}, "unknown weight format -1"),
    "one dimension": ({"values": random(15, seed=0)}, "out, in"),
    "no rows": ({"values": torch.empty(0, 3)}, "not be empty"),
    "no inputs": ({"values": torch.empty(5, 0), "in_features": 0}, "not be empty"),
    "other inputs": ({"in_features": 4}, "values must be contiguous"),
    "other type": ({"values": random(5, 3, seed=0).half()}, "values must be contiguous"),
    "strided": ({"values": random(3, 5, seed=0).T}, "values must be contiguous"),
    "scales": ({"scales": random(5, seed=0)}, "scales belong to the quantised"),
    "no scales": ({"values": torch.ones(5, 3, dtype=torch.int8), "format": 3}, "scales belong"),
    "minimums": ({"minimums": random(5, seed=0)}, "minimums belong"),
    "long bias": ({"bias": random(6, seed=0)}, "bias must be"),
    "half bias": ({"bias": random(5, seed=0).half()}, "bias must be"),
    "int64 order": ({"order": packed.places(5, False).long()} if native.unavailable is None else {}, "int32"),
    "short order": ({"order": torch.zeros(PANEL - 1, dtype=torch.int32)}, "whole panels"),
    "no order": ({"order": torch.zeros(0, dtype=torch.int32)}, "whole panels"),
    "no group": (
        {
            "values": torch.ones(5, 33, dtype=torch.int8),
            "in_features": 33,
            "format": 4,
            "scales": torch.ones(5, 1),
        },
        "multiple of 32",
    ),
    "scales of groups": (
        {
            "values": torch.ones(5, 64, dtype=torch.int8),
            "in_features": 64,
            "format": 4,
            "scales": torch.ones(5, 1),
        },
        "scales must be",
    ),
    "no minimums": (
        {
            "values": torch.ones(5, 32, dtype=torch.uint8),
            "in_features": 64,
            "format": 5,
            "scales": torch.ones(5, 2),
        },
        "minimums belong",
    ),
    **{
        name: ({"order": torch.full((PANEL,), value, dtype=torch.int32)}, "rows of the weight")
        for name, value in WRONG_ORDER.items()
    },
}


@pytest.mark.parametrize(("changed", "message"), BAD_PACKS.values(), ids=BAD_PACKS)
def test_packing_refuses(changed: dict[str, Any], message: str) -> None:
    torch.ops.minilm.pack_linear(*pack_arguments())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.minilm.pack_linear(*pack_arguments(**changed))


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": 17}, "unknown weight format 17"),
    "another format": ({"format": 1}, "packed was not made for"),
    "one dimension": ({"x": random(3, seed=0)}, "x must be"),
    "other type": ({"x": random(2, 3, seed=0).double()}, "x must be"),
    "strided": ({"x": random(3, 2, seed=0).T}, "x must be"),
    "no inputs": ({"x": torch.empty(2, 0)}, "x must be"),
    "more inputs": ({"x": random(2, 40, seed=0)}, "packed was not made for"),
    "fewer inputs": ({"x": random(2, 2, seed=0)}, "packed was not made for"),
    "more places": ({"places": 2 * PANEL}, "packed was not made for"),
    "part of a panel": ({"places": PANEL - 1}, "do not belong together"),
    "negative places": ({"places": -PANEL}, "do not belong together"),
    "no columns": ({"columns": 0}, "do not belong together"),
    "more columns": ({"columns": PANEL + 1}, "do not belong together"),
    "gated": ({"gated": True}, "do not belong together"),
    "activation": ({"activation": 7}, "unknown activation"),
    "negative activation": ({"activation": -1}, "unknown activation"),
    "huge places": ({"places": (2**62 // PANEL) * PANEL}, "too large"),
}


@pytest.mark.parametrize(("changed", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_the_layer_refuses(changed: dict[str, Any], message: str) -> None:
    made = packed.pack(random(5, 3, seed=0), None)
    good = {
        "x": random(2, 3, seed=1),
        "packed": made.data,
        "format": made.format,
        "columns": made.columns,
        "places": made.places,
        "activation": 0,
        "gated": False,
    }
    torch.ops.minilm.packed_linear(*good.values())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.minilm.packed_linear(*{**good, **changed}.values())
    for data in (made.data[:-1], made.data.repeat(2), made.data.view(torch.int8), made.data.view(-1, 64)):
        with pytest.raises(RuntimeError, match="packed was not made for"):
            torch.ops.minilm.packed_linear(*{**good, "packed": data}.values())


def test_opcheck() -> None:
    made = packed.pack(random(5, 3, seed=0), None)
    arguments = random(2, 3, seed=1), made.data, made.format, made.columns, made.places, 1, False
    torch.library.opcheck(torch.ops.minilm.packed_linear.default, arguments)
    torch.library.opcheck(torch.ops.minilm.pack_linear.default, pack_arguments())


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set(isa: str) -> None:
    """This file again, in a process that is told to use another instruction set than the best."""
    passes_with(isa, __file__, chosen="close or bound or depend or infinity or beyond or refuses or rounded")
