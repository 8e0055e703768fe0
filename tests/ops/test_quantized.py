"""Quantised weights: formats against formulas written down for themselves, bytes against llama.cpp's own
quantisers, the op, and the layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_as_good_as_eager, assert_close
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, seeds
from torch import Tensor, nn

from minilm import ops
from minilm.model.layers import Embedding, Linear
from minilm.ops import dispatch
from minilm.ops.quantized import (
    FORMATS,
    QuantizedWeight,
    check,
    dequantise,
    empty,
    plane_shapes,
    quantise,
)
from minilm.quantized import QuantizedEmbedding, QuantizedLinear

GROUPED = ("q8_0", "q4_0", "q4_1")


def matrix(seed: int, rows: int, columns: int, *, mean: float = 0.0, spread: float = 1.0) -> Tensor:
    """Normal numbers, and among them the groups that are special: zeros, equal values, ties of the extremes,
    halves that rounding decides, tiny and large ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * spread + mean
    kinds = torch.randint(0, 9, (rows, (columns + 31) // 32), generator=generator)
    for row, group in (kinds > 3).nonzero().tolist():
        part = x[row, 32 * group : 32 * group + 32]
        kind = int(kinds[row, group])
        if kind == 4:
            part.zero_()
        elif kind == 5:
            part.fill_(float(part[0]))
        elif kind == 6:
            part[::3] = -part[0]
        elif kind == 7:  # with the scale 1, all are halves of a code
            part.copy_(torch.randint(-253, 254, part.shape, generator=generator) / 2)
            part[0] = 127.0
        else:
            part.mul_(10.0 ** float(torch.randint(-7, 4, (), generator=generator)))
    return x


def values(weight: QuantizedWeight) -> np.ndarray[Any, Any]:
    """What the planes stand for, element by element, in float64."""
    codes, scale = weight.codes.numpy(), weight.scale.double().numpy()
    out = np.empty(weight.shape)
    for row in range(weight.rows):
        for column in range(weight.columns):
            group = column // 32
            if weight.format == "int8":
                out[row, column] = scale[row] * int(codes[row, column])
                continue
            code = int(codes[row, column]) if weight.format == "q8_0" else 0
            if weight.format != "q8_0":
                byte = int(codes[row, 16 * group + column % 16])
                code = byte & 15 if column % 32 < 16 else byte >> 4
            if weight.format == "q4_0":
                code -= 8
            out[row, column] = scale[row, group] * code
            if weight.minimum is not None:
                out[row, column] += float(weight.minimum[row, group])
    return out


def random_weight(format: str, rows: int, columns: int, seed: int) -> QuantizedWeight:
    """Any codes, as a file may have them."""
    generator = torch.Generator().manual_seed(seed)
    weight = empty(format, rows, columns)
    low, high = (0, 256) if weight.codes.dtype == torch.uint8 else (-127, 128)
    weight.codes.copy_(torch.randint(low, high, weight.codes.shape, generator=generator))
    for name in ("scale", "minimum"):
        if name in weight.planes:
            plane = weight.planes[name]
            plane.copy_(torch.randn(plane.shape, generator=generator) * 0.1)
    return weight


def blocks(weight: QuantizedWeight) -> np.ndarray[Any, Any]:
    """The planes as the blocks of a GGUF file, [rows, groups, bytes]."""
    parts = [weight.scale, *([] if weight.minimum is None else [weight.minimum]), weight.codes]
    shape = (*weight.scale.shape, -1)
    return np.concatenate([part.numpy().view(np.uint8).reshape(shape) for part in parts], axis=-1)


# --- formats ---


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dequantise(format: str, dtype: torch.dtype) -> None:
    @examples(8)
    @given(st.integers(0, 5), st.integers(1, 4), seeds())
    def check_values(rows: int, groups: int, seed: int) -> None:
        weight = random_weight(format, rows, 32 * groups if format != "int8" else 32 * groups - 7, seed)
        found = dequantise(weight, dtype)
        assert found.dtype == dtype
        expected = torch.from_numpy(values(weight))
        once = torch.finfo(dtype).eps + (2e-7 if dtype != torch.float64 else 0)
        assert_close(found, expected, atol=once * max(1.0, float(expected.abs().max()) if rows else 0.0))

    check_values()


@pytest.mark.parametrize("format", GROUPED)
def test_the_bytes_are_those_of_llama_cpp(format: str) -> None:
    @examples(40)
    @given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([0.0, 3.0, -50.0]), seeds())
    def check_bytes(rows: int, groups: int, mean: float, seed: int) -> None:
        x = matrix(seed, rows, 32 * groups, mean=mean)
        theirs = quantize(x.numpy(), GGMLQuantizationType[format.upper()])
        assert np.array_equal(blocks(quantise(x, format)), theirs.reshape(rows, groups, -1))

    check_bytes()


@pytest.mark.parametrize("format", GROUPED)
def test_large_matrices_are_cut_into_pieces_that_fit(format: str) -> None:
    x = matrix(5, 700, 32 * 29)  # more than one piece, the last one shorter
    theirs = quantize(x.numpy(), GGMLQuantizationType[format.upper()])
    assert np.array_equal(blocks(quantise(x, format)), theirs.reshape(700, 29, -1))


@given(st.integers(1, 20), st.integers(1, 100), st.sampled_from([0.0, 20.0]), seeds())
def test_int8_is_within_half_a_step(rows: int, columns: int, mean: float, seed: int) -> None:
    x = matrix(seed, rows, columns, mean=mean)
    weight = quantise(x, "int8")
    assert int(weight.codes.amin()) >= -127
    error = (dequantise(weight, torch.float64) - x.double()).abs()
    assert bool((error <= weight.scale.double()[:, None] * (0.5 + 1e-5)).all())
    full = weight.codes.abs().amax(1)
    assert bool(((full == 127) | (x.abs().amax(1) == 0)).all())


@pytest.mark.parametrize(("format", "steps"), [("q8_0", 0.5), ("q4_0", 1.0), ("q4_1", 0.5)])
def test_groups_are_within_a_step(format: str, steps: float) -> None:
    """q4_0 reaches from -8 to 7 steps, so that the far end of the other sign is cut by up to one."""

    @examples(15)
    @given(st.integers(1, 6), st.integers(1, 3), seeds())
    def check_error(rows: int, groups: int, seed: int) -> None:
        x = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed))
        weight = quantise(x, format)
        step = weight.scale.double().abs().repeat_interleave(32, dim=1)
        error = (dequantise(weight, torch.float64) - x.double()).abs()
        # scales and minima are rounded to float16, which moves the 127th step by as many roundings
        rounding = x.abs().amax().double() * 2**-10
        assert bool((error <= steps * step + rounding).all())

    check_error()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_strides_quantise_as_float32(format: str, dtype: torch.dtype) -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = quantise(x.t().contiguous().float(), format)
    found = quantise(x.t(), format)
    assert all(torch.equal(found.planes[name], expected.planes[name]) for name in expected.planes)
    needs_grad = x.t().clone().requires_grad_()
    assert torch.equal(quantise(needs_grad, format).codes, expected.codes)


@pytest.mark.parametrize("format", GROUPED)
def test_columns_must_fill_the_groups(format: str) -> None:
    with pytest.raises(ValueError, match=rf"{format}.* 33 columns .*multiple of 32"):
        quantise(torch.ones(2, 33), format)
    with pytest.raises(ValueError, match="multiple of 32"):
        plane_shapes(format, 4, 16)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(format: str, value: float) -> None:
    x = torch.ones(3, 64)
    x[1, 40] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantise(x, format)


@pytest.mark.parametrize("format", GROUPED)
def test_values_beyond_float16_are_refused(format: str) -> None:
    x = torch.zeros(3, 64)
    x[1, 40] = 1e8
    with pytest.raises(ValueError, match=r"1e\+08.*float16"):
        quantise(x, format)
    assert float(dequantise(quantise(x, "int8"), torch.float32)[1, 40]) == pytest.approx(1e8)


def test_numbers_as_good_as_zero() -> None:
    """A scale that float16 cannot tell from zero, or whose inverse float32 cannot hold, makes zeros."""
    for size in (1e-9, 1e-40):
        for format in GROUPED:
            found = dequantise(quantise(torch.full((1, 32), size), format), torch.float32)
            assert float(found.abs().max()) <= 1e-7


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(4), "matrix"),
        (torch.ones(2, 32, dtype=torch.int32), "int32"),
        (torch.ones(2, 0), "columns"),
    ],
)
def test_what_is_no_matrix_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantise(x, "int8")


def test_formats_have_names() -> None:
    for call in (lambda: quantise(torch.ones(2, 32), "q5_0"), lambda: empty("gptq", 2, 32)):
        with pytest.raises(ValueError, match="there is no weight format"):
            call()


def changed(weight: QuantizedWeight, **planes: Any) -> QuantizedWeight:
    return weight._replace(**planes)


def wrong_weights() -> dict[str, tuple[QuantizedWeight, str]]:
    q8, q41, int8 = (quantise(torch.ones(4, 64), f) for f in ("q8_0", "q4_1", "int8"))
    return {
        "codes of another dtype": (changed(q8, codes=q8.codes.to(torch.uint8)), "torch.int8"),
        "codes of one dimension": (changed(q8, codes=q8.codes[0]), "two dimensions"),
        "codes of three dimensions": (changed(q8, codes=q8.codes[None]), "two dimensions"),
        "half a group": (changed(q8, codes=q8.codes[:, :48]), "48 columns"),
        "a group too few": (changed(q8, scale=q8.scale[:, :1]), r"\[4, 2\].*\[4, 1\]"),
        "a row too many": (changed(q8, scale=torch.ones(5, 2).half()), r"\[4, 2\].*\[5, 2\]"),
        "scales in float32": (changed(q8, scale=q8.scale.float()), "float16"),
        "a scale for each group": (changed(int8, scale=torch.ones(4, 2)), r"\[4\].*\[4, 2\]"),
        "no minimum": (changed(q41, minimum=None), "needs a minimum"),
        "a minimum": (changed(q8, minimum=q8.scale), "has no minimum"),
        "a minimum too short": (changed(q41, minimum=q41.scale[:3]), "minimum"),
        "another name": (changed(q8, format="q8_1"), "no weight format 'q8_1'"),
        "planes apart": (changed(q8, scale=q8.scale.to("meta")), "meta"),
        "no columns": (changed(int8, codes=int8.codes[:, :0]), "columns"),
    }


@pytest.mark.parametrize("name", wrong_weights())
def test_planes_that_do_not_fit(name: str) -> None:
    weight, message = wrong_weights()[name]
    for call in (
        lambda: check("op", weight),
        lambda: dequantise(weight, torch.float32),
        lambda: ops.quantized_linear(torch.ones(1, 64), weight),
        lambda: QuantizedLinear(weight),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_rows_are_split_without_a_copy() -> None:
    weight = quantise(torch.randn(7, 64), "q4_1")
    parts = weight.split((4, 0, 3))
    assert [part.shape for part in parts] == [(4, 64), (0, 64), (3, 64)]
    together = torch.cat([dequantise(part, torch.float32) for part in parts])
    assert torch.equal(together, dequantise(weight, torch.float32))
    assert parts[2].codes.data_ptr() == weight.codes[4:].data_ptr()
    assert weight.nbytes == 7 * (32 + 2 * 2 + 2 * 2)


# --- the op ---


@pytest.mark.parametrize("format", FORMATS)
def test_the_op_is_the_dequantised_product(format: str) -> None:
    @examples(15)
    @given(
        st.lists(st.integers(0, 4), max_size=2),
        st.integers(0, 9),
        st.integers(1, 3),
        st.sampled_from([None, "gelu", "silu", "tanh"]),
        st.booleans(),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
        seeds(),
    )
    def check_op(
        leading: list[int],
        rows: int,
        groups: int,
        activation: str | None,
        with_bias: bool,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        weight = random_weight(format, rows, 32 * groups, seed)
        generator = torch.Generator().manual_seed(seed)
        x = (
            torch.randn(*leading, 2 * 32 * groups, generator=generator, dtype=torch.float64)
            .add(0.5)
            .to(dtype)
        )
        x = x[..., ::2]  # not contiguous
        bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
        with ops.backend("reference"):
            y = ops.quantized_linear(x, weight, bias, activation)
        dense = torch.from_numpy(values(weight))
        wide = None if bias is None else bias.double()
        exact = ops.linear(x.double(), dense, wide, activation)
        eager = ops.linear(x, dense.to(dtype), bias, activation)
        assert y.shape == (*leading, rows)
        assert_as_good_as_eager(y, eager, exact)

    check_op()


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_go_through_to_x_and_bias(format: str) -> None:
    weight = random_weight(format, 5, 64, 1)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with ops.backend("reference"):
        torch.autograd.gradcheck(lambda x, b: ops.quantized_linear(x, weight, b, "gelu"), (x, bias))


@pytest.mark.parametrize(
    ("x", "bias", "activation", "message"),
    [
        (torch.ones(2, 63), None, None, r"\[2, 63\].*64.*\[4, 64\]"),
        (torch.tensor(1.0), None, None, r"\[\]"),
        (torch.ones(2, 64), torch.ones(3), None, r"bias must be \[4\], and is \[3\]"),
        (torch.ones(2, 64), None, "swoosh", "swoosh"),
    ],
)
def test_calls_that_do_not_fit(x: Tensor, bias: Tensor | None, activation: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.quantized_linear(x, quantise(torch.ones(4, 64), "q4_0"), bias, activation)


def test_traits_tell_decoding_from_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    genuine = dispatch.select

    def asked(op: str, traits: Any) -> Any:
        seen.append(traits)
        return genuine(op, traits)

    monkeypatch.setattr(dispatch, "select", asked)
    weight = quantise(torch.ones(4, 64), "q4_0")
    for rows in (0, 1, ops.FEW_ROWS, ops.FEW_ROWS + 1):
        ops.quantized_linear(torch.ones(rows, 64), weight)
    ops.quantized_linear(torch.ones(4, 5, 64, requires_grad=True), weight, None, "silu")
    found = [traits for traits in seen if isinstance(traits, ops.QuantizedTraits)]
    assert [traits.few_rows for traits in found] == [True, True, True, False, False]
    assert [traits.grad for traits in found] == [False] * 4 + [True]
    assert found[-1][:6] == ("cpu", torch.float32, "q4_0", "silu", False, True)


# --- the layers ---


@pytest.fixture(autouse=True)
def _specification() -> Any:
    """What is tested here is not how fast implementations round."""
    with ops.backend("torch", "reference"):
        yield


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_drop_in(format: str, bias: bool) -> None:
    floating = Linear(64, 6, bias=bias)
    nn.init.normal_(floating.weight)
    if bias:
        nn.init.normal_(floating.bias)
    layer = QuantizedLinear(quantise(floating.weight, format), floating.bias if bias else None)
    with torch.no_grad():
        floating.weight.copy_(dequantise(layer.quantized, torch.float32))
    x = torch.randn(2, 3, 64)
    assert torch.equal(layer(x, "gelu"), floating(x, "gelu"))
    assert (layer.in_features, layer.out_features) == (64, 6)
    assert format in repr(layer)
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if bias else [])


@pytest.mark.parametrize("format", FORMATS)
def test_embedding_is_drop_in(format: str) -> None:
    floating = Embedding(11, 64, padding_idx=2)
    nn.init.normal_(floating.weight)
    layer = QuantizedEmbedding(quantise(floating.weight, format), torch.float32, floating.padding_idx)
    with torch.no_grad():
        floating.weight.copy_(dequantise(layer.quantized, torch.float32))
    for tokens in (torch.tensor([[3, 0, 10], [2, 2, 9]]), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(layer(tokens), floating(tokens))
    hidden = torch.randn(4, 64)
    assert torch.equal(layer.scores(hidden), floating.scores(hidden))
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (11, 64, 2)
    with pytest.raises(IndexError):
        layer(torch.tensor([11]))


@pytest.mark.parametrize("format", FORMATS)
def test_planes_keep_their_dtypes_when_a_module_changes_its_own(format: str) -> None:
    linear = QuantizedLinear(quantise(torch.randn(4, 64), format), nn.Parameter(torch.ones(4)))
    table = QuantizedEmbedding(quantise(torch.randn(4, 64), format), torch.float32)
    before = {name: plane.clone() for name, plane in linear.quantized.planes.items()}
    module = nn.ModuleList([linear, table])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        module.to(dtype)
        assert all(torch.equal(linear.quantized.planes[n], plane) for n, plane in before.items())
        assert linear.bias is not None
        assert linear.bias.dtype == dtype
        assert table(torch.tensor([1])).dtype == dtype
        assert linear(torch.ones(1, 64, dtype=dtype)).dtype == dtype
    module.half().float()
    assert all(torch.equal(linear.quantized.planes[n], plane) for n, plane in before.items())
    assert table.to("meta").quantized.codes.is_meta
    made = table.to_empty(device="cpu").quantized
    assert {n: (p.shape, p.dtype) for n, p in made.planes.items()} == {
        n: (p.shape, p.dtype) for n, p in before.items()
    }


@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_copies_and_pickles(format: str) -> None:
    one = QuantizedLinear(quantise(torch.randn(4, 64), format), nn.Parameter(torch.randn(4)))
    other = QuantizedLinear(quantise(torch.randn(4, 64), format), nn.Parameter(torch.randn(4)))
    assert set(one.state_dict()) == {*one.quantized.planes, "bias"}
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 64)
    for same in (other, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert torch.equal(same(x), one(x))
    wrong = QuantizedLinear(quantise(torch.randn(4, 64), "q4_1" if format != "q4_1" else "q4_0"))
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing|Unexpected"):
        wrong.load_state_dict(one.state_dict())


@pytest.mark.slow
def test_torch_compile_takes_the_layers_whole() -> None:
    for format in FORMATS:
        linear = QuantizedLinear(quantise(torch.randn(8, 64), format), nn.Parameter(torch.ones(8)))
        table = QuantizedEmbedding(quantise(torch.randn(8, 64), format), torch.float32)
        for layer, argument in ((linear, torch.randn(3, 64)), (table, torch.tensor([1, 7]))):
            compiled = torch.compile(layer, fullgraph=True, backend="eager")
            assert torch.equal(compiled(argument), layer(argument))


def test_training_is_refused() -> None:
    layer = QuantizedLinear(quantise(torch.randn(4, 64), "int8"))
    assert not layer.training
    assert not nn.ModuleList([layer]).eval()[0].training
    with pytest.raises(RuntimeError, match=r"QuantizedLinear \(int8\) cannot be trained.*without weights="):
        nn.ModuleList([layer]).train()
