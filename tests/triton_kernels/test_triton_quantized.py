"""The product with a quantised weight in Triton's interpreter: against float64, its NumPy twin, and PyTorch's
rules for ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from close import assert_as_good_as_eager, assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, seeds
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from minilm import ops
from minilm.kernels import quantized_matmul
from minilm.kernels.devices import CHIPS, INTERPRETER
from minilm.kernels.heuristics import quantized_block
from minilm.ops.quantized import FORMATS, QuantizedWeight, dequantise, plane_shapes

H100 = CHIPS["sm_90"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(format: str, outs: int, ins: int, seed: int) -> QuantizedWeight:
    """Every byte there is, -128 included, and scales of both signs: more than `quantise` makes."""
    g = torch.Generator().manual_seed(seed)
    planes = {}
    for name, (shape, dtype) in plane_shapes(format, outs, ins).items():
        if dtype in (torch.int8, torch.uint8):
            low = torch.iinfo(dtype).min
            planes[name] = torch.randint(low, low + 256, shape, generator=g).to(dtype)
        else:
            spread = 1 / 16 if FORMATS[format].per_byte == 2 else 1 / 128
            planes[name] = (
                (torch.randn(shape, generator=g) + 0.5) * (spread if name == "scale" else 0.5)
            ).to(dtype)
    return QuantizedWeight(format, **planes)


def results(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, name: str | None) -> list[Tensor]:
    """Exact, eager and ours."""
    found = []
    for backend, dtype in (("reference", torch.float64), ("reference", x.dtype), ("triton", x.dtype)):
        with ops.backend(backend):
            b = None if bias is None else bias.to(dtype)
            found.append(ops.quantized_linear(x.to(dtype), weight, b, name))
    return found


def rounding(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, name: str | None, exact: Tensor
) -> float:
    """What an output may be off by whatever eager gets right: one unit in the last place of the result, and
    one in float32 of the sum of the magnitudes, which is what any order of summing leaves. The terms may
    cancel, and eager may be exact by luck where there is one output."""
    w = dequantise(weight, torch.float64)
    z, terms = x.double() @ w.T, x.double().abs() @ w.T.abs()
    if bias is not None:
        z, terms = z + bias.double(), terms + bias.double().abs()
    slope = 2 * float(z.abs().max()) if name == "relu2" else 1.13  # the steepest that gelu and silu are
    units = torch.finfo(x.dtype).eps * float(exact.abs().max())
    return units + torch.finfo(torch.float32).eps * slope * float(terms.max())


@examples(60)
@given(
    st.sampled_from([*FORMATS]), st.sampled_from([(1,), (2,), (15,), (16,), (17,), (64,), (65,), (2, 3)]),
    st.sampled_from([1, 31, 63, 64, 65, 131]), st.sampled_from([32, 64, 96, 128, 160, 416]),
    st.sampled_from(DTYPES), st.booleans(), st.sampled_from([None, "gelu", "silu", "relu2"]),
    st.booleans(), seeds(),
)  # fmt: skip
def test_quantized_linear(
    format: str, lead: tuple[int, ...], outs: int, ins: int, dtype: torch.dtype, bias: bool,
    name: str | None, strided: bool, seed: int,
) -> None:  # fmt: skip
    """Every format at sizes around the tiles of 16 rows, 64 outputs and 128 inputs; int8 at odd sizes too."""
    ins -= 5 * (format == "int8")
    weight = weight_of(format, outs, ins, seed)
    x = draw(seed + 1, *lead, ins) + 0.3
    if strided:
        x = (
            torch.stack([x, -x], dim=-2).flatten(-3, -2)[..., ::2, :]
            if len(lead) == 1
            else x.mT.contiguous().mT
        )
    x, b = x.to(dtype), draw(seed + 2, outs).to(dtype) if bias else None
    exact, eager, ours = results(x, weight, b, name)
    assert ours.shape == (*lead, outs)
    # Casts to bfloat16 are cut in the interpreter instead of rounded.
    factor, floor = 3.0 if dtype == torch.bfloat16 else 2.0, rounding(x, weight, b, name, exact)
    assert_as_good_as_eager(ours, eager, exact, factor=factor, floor=floor)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_in_parts(format: str, dtype: torch.dtype) -> None:
    """A narrow and deep weight is split, and the last part is shorter."""
    outs, ins = 33, 32 * 49
    block = quantized_block(3, outs, ins, dtype.itemsize, INTERPRETER)
    assert block.splits > 1
    assert -(-ins // block.ins) % block.splits
    x, weight = (draw(0, 3, ins) + 0.3).to(dtype), weight_of(format, outs, ins, 1)
    bias = draw(2, outs).to(dtype)
    exact, eager, ours = results(x, weight, bias, "silu")
    factor, floor = 3.0 if dtype == torch.bfloat16 else 2.0, rounding(x, weight, bias, "silu", exact)
    assert_as_good_as_eager(ours, eager, exact, factor=factor, floor=floor)


@pytest.mark.parametrize("format", FORMATS)
def test_the_numpy_twin_says_the_same(format: str) -> None:
    x, weight = draw(0, 5, 192).double().numpy(), weight_of(format, 37, 192, 1)
    planes = {
        n: p.numpy() if "int8" in str(p.dtype) else p.double().numpy() for n, p in weight.planes.items()
    }
    expected = quantized_matmul.twin(x, format, planes["codes"], planes["scale"], planes.get("minimum"))
    np.testing.assert_allclose(expected, x @ dequantise(weight, torch.float64).numpy().T, atol=1e-12)
    with ops.backend("triton"):
        ours = ops.quantized_linear(torch.from_numpy(x).float(), weight)
    np.testing.assert_allclose(ours.numpy(), expected, atol=4e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_each_code_is_in_its_place(format: str) -> None:
    """x is one column at a time, so y is that column of the weight, exactly."""
    weight = weight_of(format, 65, 96, 0)
    with ops.backend("triton"):
        y = ops.quantized_linear(torch.eye(96), weight)
    assert_close(y.T, dequantise(weight, torch.float32), atol=1e-6)


def test_planes_with_strides() -> None:
    """A weight cut out of a larger one: rows of every plane are elsewhere. Every sum is exact, in any order:
    small whole numbers times powers of two."""
    whole, x = weight_of("q4_1", 40, 64, 0), draw(1, 2, 64).mul(2).round()
    assert whole.minimum is not None
    whole = whole._replace(
        scale=torch.exp2(whole.scale.mul(16).round().clamp(-3, 0)), minimum=whole.minimum.mul(8).round() / 8
    )
    part = whole._replace(**{n: getattr(whole, n)[::2] for n in ("codes", "scale", "minimum")})
    with ops.backend("triton"):
        assert torch.equal(ops.quantized_linear(x, part), ops.quantized_linear(x, whole)[:, ::2])


@pytest.mark.parametrize("format", ["int8", "q4_1"])
def test_what_is_no_number_stays_in_its_row(format: str) -> None:
    x, weight = draw(0, 3, 64), weight_of(format, 9, 64, 0)
    x[1, 5] = float("nan")
    with ops.backend("triton"):
        y = ops.quantized_linear(x, weight, None, "relu")
    assert y.isnan().any(1).tolist() == [False, True, False]


def test_no_rows() -> None:
    with ops.backend("triton"):
        assert ops.quantized_linear(torch.zeros(0, 64), weight_of("q8_0", 9, 64, 0)).shape == (0, 9)
        assert ops.quantized_linear(torch.zeros(2, 64), weight_of("q8_0", 0, 64, 0)).shape == (2, 0)


def test_gradients_are_refused() -> None:
    x = draw(0, 2, 64).requires_grad_()
    with ops.backend("triton"):
        with pytest.raises(ops.BackendError, match="no derivative"):
            ops.quantized_linear(x, weight_of("int8", 9, 64, 0))
        with torch.no_grad():
            ops.quantized_linear(x, weight_of("int8", 9, 64, 0))


@pytest.mark.parametrize("format", ["int8", "q4_1"])
def test_opcheck(format: str) -> None:
    weight = weight_of(format, 9, 64, 0)
    arguments = (draw(0, 3, 64), format, weight.codes, weight.scale, weight.minimum, draw(1, 9), "silu")
    torch.library.opcheck(quantized_matmul.quantized_linear_op, arguments)


def test_it_compiles_as_one_graph() -> None:
    up, down = weight_of("q4_0", 128, 64, 0), weight_of("int8", 64, 64, 1)

    def mlp(x: Tensor) -> Tensor:
        return ops.quantized_linear(ops.gated(ops.quantized_linear(x, up), "silu"), down)

    x = draw(2, 3, 64)
    with ops.backend("triton"):
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), mlp(x), atol=1e-5)


def test_tiles_and_parts() -> None:
    for outs, ins in ((576, 1536), (4096, 4096), (1, 32), (151936, 896), (64, 100_000)):
        for processors in (2, 108, 132):
            chip = H100._replace(processors=processors)
            blocks = {quantized_block(rows, outs, ins, 2, chip)._replace(rows=0) for rows in (1, 5, 64)}
            assert len(blocks) == 1, "a row must be summed in the same order alone and in a batch"
            block = blocks.pop()
            assert block.ins % 32 == 0
            steps = -(-ins // block.ins)
            assert block.splits == 1 or steps / block.splits >= 4
            assert block.splits == 1 or -(-outs // block.outs) * block.splits < 4 * processors
    assert quantized_block(1, 576, 1536, 2, H100).splits == 2
    assert quantized_block(1, 4096, 4096, 2, H100).splits == 8
    assert [quantized_block(rows, 64, 64, 2, H100).rows for rows in (1, 16, 17, 500)] == [16, 16, 32, 128]
