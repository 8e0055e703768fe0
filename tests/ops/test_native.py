"""The native extension: its layer norms against the specification, in every data type and instruction set."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import assert_as_good_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from native_runs import OTHER_ISAS, passes_with, random, require_extension
from torch import Tensor

from minilm import ops
from minilm.ops.backends import native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 127, 128, 200, 384, 768, 1000)
EPS = 1e-5


@pytest.fixture(autouse=True)
def _extension_is_there() -> None:
    require_extension()


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x [..., C] in another memory layout."""
    if layout == "rows apart":  # a slice of a wider matrix, as q is of a fused projection
        return torch.cat((random(*x.shape, seed=1, dtype=x.dtype), x, x), dim=-1)[
            ..., x.shape[-1] : 2 * x.shape[-1]
        ]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


@settings(max_examples=300)
@given(
    leading=st.sampled_from([(), (0,), (1,), (2,), (5,), (2, 3), (3, 0, 2)]),
    channels=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(DTYPES),
    wide_parameters=st.booleans(),
    residual=st.booleans(),
    bias=st.booleans(),
    mean=st.sampled_from([0.0, -3.0, 100.0, 1e4]),
    deviation=st.sampled_from([1e-3, 1.0, 50.0]),
    layout=st.sampled_from(["contiguous", "rows apart", "transposed"]),
    eps=st.sampled_from([1e-12, 1e-5, 0.1]),
    seed=st.integers(0, 2**32),
)
def test_norm_is_close(
    leading: tuple[int, ...],
    channels: int,
    dtype: torch.dtype,
    wide_parameters: bool,
    residual: bool,
    bias: bool,
    mean: float,
    deviation: float,
    layout: str,
    eps: float,
    seed: int,
) -> None:
    x = (random(*leading, channels, seed=seed, dtype=torch.float64) * deviation + mean).to(dtype)
    r = (random(*leading, channels, seed=seed + 1, dtype=torch.float64) * deviation).to(dtype)
    x, r = laid_out(x, layout), laid_out(r, "contiguous" if seed % 2 else layout)
    parameter_dtype = torch.float32 if wide_parameters and dtype.itemsize == 2 else dtype
    w = random(channels, seed=seed + 2, dtype=parameter_dtype)
    b = random(channels, seed=seed + 3, dtype=parameter_dtype) if bias else None
    before = x.clone(), r.clone()

    if residual:
        y, total, m, rstd = torch.ops.minilm.add_layer_norm(x, r, w, b, eps)
        assert torch.equal(total, x + r)
    else:
        y, m, rstd = torch.ops.minilm.layer_norm(x, w, b, eps)
        total = x

    exact = total.double()
    exact_mean = exact.mean(-1, keepdim=True)
    exact_rstd = ((exact - exact_mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    exact_y = F.layer_norm(exact, (channels,), w.double(), None if b is None else b.double(), eps)
    floor = None
    if dtype == torch.float64 and total.numel():  # here the reference rounds as much as what it judges
        scale = (exact.abs().max() * exact_rstd.max() * w.abs().max() + exact_y.abs().max()).item()
        floor = 4 * torch.finfo(dtype).eps * scale
    eager = F.layer_norm(total, (channels,), w, b, eps)
    assert_as_good_as_eager(y, eager, exact_y, floor=floor, what="y")
    assert y.is_contiguous()
    assert m.shape == rstd.shape == (*leading, 1)
    assert m.dtype == rstd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    unit = torch.finfo(m.dtype).eps
    torch.testing.assert_close(
        m.double(), exact.mean(-1, keepdim=True), rtol=2 * unit, atol=4 * unit * deviation
    )
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=16 * unit, atol=0)
    assert torch.equal(x, before[0])
    assert torch.equal(r, before[1])


@pytest.mark.parametrize("channels", [384, 1001])
def test_mean_far_from_zero_costs_no_accuracy(channels: int) -> None:
    """x takes values that float32 holds exactly near 2^20, so whatever is lost is lost by the norm."""
    x = (random(7, channels, seed=0) * 4).round() / 8 + 2.0**20
    w, b = random(channels, seed=1), random(channels, seed=2)
    exact = F.layer_norm(x.double(), (channels,), w.double(), b.double(), EPS)
    error = (ops.layer_norm(x, w, b, EPS) - exact).abs().max()
    assert error < 2e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [16, 5])
def test_every_16_bit_number_is_added_as_pytorch_adds_it(dtype: torch.dtype, channels: int) -> None:
    """All 65,536 patterns, with subnormals, infinities and NaN: widened, added, rounded to nearest even."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = F.pad(patterns, (0, -len(patterns) % channels)).view(-1, channels)
    w = torch.ones(channels, dtype=dtype)
    other = x.flatten()[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))].view_as(x)
    for r in (torch.zeros_like(x), random(*x.shape, seed=1, dtype=dtype), other):
        total = torch.ops.minilm.add_layer_norm(x, r, w, None, EPS)[1]
        torch.testing.assert_close(total, x + r, rtol=0, atol=0, equal_nan=True)


def test_infinities_and_nan_stay_in_their_row() -> None:
    x = random(4, 33, seed=0)
    clean = ops.layer_norm(x, torch.ones(33), None, EPS)
    x[1, 5], x[2, 32] = float("inf"), float("nan")
    y = ops.layer_norm(x, torch.ones(33), None, EPS)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert y[1:3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_nan_of_any_payload_stays_nan(dtype: torch.dtype) -> None:
    """All its mantissa's bits are set: rounding it up as if it were a number would give zero."""
    bias = torch.full((21,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for b in (bias, -bias):
        assert native.layer_norm(random(3, 21, seed=0, dtype=dtype), torch.ones(21), b, EPS).isnan().all()


def test_one_channel_and_equal_channels_give_the_bias() -> None:
    bias = random(9, seed=0)
    for channels in (1, 9):
        y = ops.layer_norm(torch.full((3, channels), 7.0), random(channels, seed=1), bias[:channels], EPS)
        assert torch.equal(y, bias[:channels].expand(3, channels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 31, 384, 1000])
def test_a_row_does_not_depend_on_threads_or_batch(dtype: torch.dtype, channels: int) -> None:
    rows = max(301, 3 * 16384 // channels)  # several tasks
    x, r = random(rows, channels, seed=0, dtype=dtype), random(rows, channels, seed=1, dtype=dtype)
    w, b = random(channels, seed=2, dtype=dtype), random(channels, seed=3, dtype=dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(torch.ops.minilm.add_layer_norm(x, r, w, b, EPS))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    for row in (0, rows // 2, rows - 1):
        alone = torch.ops.minilm.add_layer_norm(x[row].clone(), r[row].clone(), w, b, EPS)
        assert all(torch.equal(whole[row], part) for whole, part in zip(results[0], alone, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called by its Linux constants")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_the_last_element_is_read(dtype: torch.dtype) -> None:
    """The data ends where a page begins that may not be touched: reading on would end the process."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    forbid, allow = 0, mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), forbid) == 0, (
        ctypes.get_errno()
    )
    for channels in (1, 5, 17, 33, 67, 129):
        end = torch.frombuffer(memory, dtype=torch.uint8, count=page)[-channels * dtype.itemsize :].view(
            dtype
        )
        end.copy_(random(channels, seed=0, dtype=dtype))
        copy = end.clone()
        for position in range(4):
            args = [copy] * 4
            args[position] = end
            expected = torch.ops.minilm.add_layer_norm(copy, copy, copy, copy, EPS)
            assert all(map(torch.equal, torch.ops.minilm.add_layer_norm(*args, EPS), expected))
    libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), allow)


SAMPLES: list[tuple[tuple[int, ...], torch.dtype, bool, bool]] = [
    # shape, dtype, bias, gradients
    ((3, 17), torch.float32, True, True),
    ((2, 3, 8), torch.float64, False, True),
    ((5,), torch.bfloat16, True, True),
    ((0, 4), torch.float32, True, False),
]


@pytest.mark.parametrize(("shape", "dtype", "bias", "grad"), SAMPLES)
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype, bias: bool, grad: bool) -> None:
    x, r = (random(*shape, seed=s, dtype=dtype).requires_grad_(grad) for s in (0, 1))
    w, b = (random(shape[-1], seed=s, dtype=dtype).requires_grad_(grad) for s in (2, 3))
    torch.library.opcheck(torch.ops.minilm.layer_norm.default, (x, w, b if bias else None, EPS))
    torch.library.opcheck(torch.ops.minilm.add_layer_norm.default, (x, r, w, b if bias else None, EPS))


@pytest.mark.parametrize("needs", ["xrwb", "x", "r", "w", "b", "xw", "rb"])
def test_gradients_of_numbers(needs: str) -> None:
    """Against finite differences, once and twice, whoever asks for a gradient; both results are used."""
    shapes = {"x": (3, 5), "r": (3, 5), "w": (5,), "b": (5,)}
    inputs = [
        random(*shape, seed=i, dtype=torch.float64).requires_grad_(name in needs)
        for i, (name, shape) in enumerate(shapes.items())
    ]

    def both(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return native.add_layer_norm(x, r.sin(), w, b, EPS)  # a residual that is not a leaf

    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)
    if "r" not in needs:
        x, _, w, b = inputs
        assert torch.autograd.gradcheck(lambda x, w, b: native.layer_norm(x, w, b, EPS), (x, w, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("used", ["y", "sum", "both"])
def test_gradients_are_close_to_eager(dtype: torch.dtype, used: str) -> None:
    def gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        x, r, w, b = leaves
        y, total = function(x * 2, r * 3, w, b, EPS)
        upstream = [g.to(dtype) for g in grads]
        results, ups = {
            "y": ([y], upstream[:1]),
            "sum": ([total], upstream[1:]),
            "both": ([y, total], upstream),
        }[used]
        torch.autograd.backward(results, ups)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    inputs = [random(6, 384, seed=i, dtype=dtype) for i in (0, 1)] + [
        random(384, seed=i, dtype=dtype) for i in (2, 3)
    ]
    grads = [random(6, 384, seed=i, dtype=dtype) for i in (4, 5)]
    actual = gradients(native.add_layer_norm, dtype)
    eager = gradients(ops.reference.add_layer_norm, dtype)
    exact = gradients(ops.reference.add_layer_norm, torch.float64)
    assert len(actual) == len(eager) == (2 if used == "sum" else 4)
    for triple in zip(actual, eager, exact, strict=True):
        assert_as_good_as_eager(*triple, what="a gradient")


def test_compiles_without_a_graph_break() -> None:
    w, b = random(24, seed=0), random(24, seed=1)

    def twice(x: Tensor, r: Tensor) -> Tensor:
        y, total = ops.add_layer_norm(x, r, w, b, EPS)
        return ops.layer_norm(y + total, w, None, EPS)

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 7):
        x, r = (random(rows, 24, seed=s).requires_grad_() for s in (2, 3))
        torch.testing.assert_close(compiled(x, r), twice(x, r))
        (actual,) = torch.autograd.grad(compiled(x, r).square().sum(), x)
        (expected,) = torch.autograd.grad(twice(x, r).square().sum(), x)
        torch.testing.assert_close(actual, expected)


def test_a_compiled_function_follows_the_choice_of_a_backend() -> None:
    targets: list[list[str]] = []

    def note(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        targets.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    w, x = random(24, seed=0), random(3, 24, seed=1)
    compiled = torch.compile(lambda x: ops.layer_norm(x, w, None, EPS), backend=note, fullgraph=True)
    compiled(x)
    assert targets[-1][0] == "minilm.layer_norm.default"
    with ops.backend("reference"):
        compiled(x)
    assert "minilm.layer_norm.default" not in targets[-1]
    compiled(x)
    with ops.backend("native"):
        compiled(x)
    assert targets[-1][0] == "minilm.layer_norm.default"


C = 6
BAD: list[tuple[str, dict[str, Tensor], str]] = [
    (
        "scalar",
        {"x": torch.tensor(1.0), "residual": torch.tensor(1.0)},
        r"x must be \[..., C\] with C >= 1, and is \[\]",
    ),
    ("no channels", {"x": torch.ones(2, 0), "residual": torch.ones(2, 0)}, r"C >= 1, and is \[2, 0\]"),
    (
        "integers",
        {"x": torch.ones(2, C, dtype=torch.int64)},
        "x must be float32, float64, bfloat16 or float16",
    ),
    (
        "other shape",
        {"residual": torch.ones(3, C)},
        r"x \[2, 6\] and residual \[3, 6\] must have the same shape",
    ),
    (
        "broadcast",
        {"residual": torch.ones(1, C)},
        r"x \[2, 6\] and residual \[1, 6\] must have the same shape",
    ),
    ("two types", {"residual": torch.ones(2, C).half()}, "the same type, and are float32 and float16"),
    ("short weight", {"weight": torch.ones(5)}, r"weight must be \[6\], the last size of x, and is \[5\]"),
    (
        "flat weight",
        {"weight": torch.ones(1, C)},
        r"weight must be \[6\], the last size of x, and is \[1, 6\]",
    ),
    ("long bias", {"bias": torch.ones(7)}, r"bias must be \[6\], the last size of x, and is \[7\]"),
    ("weight's type", {"weight": torch.ones(C).double()}, "weight must be float32 .* and is float64"),
    ("bias's type", {"bias": torch.ones(C).bfloat16()}, "bias must be float32 .* and is bfloat16"),
]


@pytest.mark.parametrize(("changed", "message"), [pytest.param(c, m, id=name) for name, c, m in BAD])
def test_the_op_refuses(changed: dict[str, Tensor], message: str) -> None:
    good = {
        "x": torch.ones(2, C),
        "residual": torch.ones(2, C),
        "weight": torch.ones(C),
        "bias": torch.ones(C),
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.minilm.add_layer_norm(*{**good, **changed}.values(), EPS)


def test_dispatch_prefers_it_and_says_why_not() -> None:
    ops.explain(reset=True)
    ops.layer_norm(random(2, 7, seed=0), torch.ones(7), None, EPS)
    assert ops.explain().backends("layer_norm") == {"native"}
    x, w = random(2, 7, seed=0, dtype=torch.float64), torch.ones(7)  # float64 data, float32 parameters
    with (
        ops.backend("native"),
        pytest.raises(ops.BackendError, match=r"float64 with parameters in torch\.float32"),
    ):
        ops.layer_norm(x, w, None, EPS)
    with ops.backend("native"), pytest.raises(ops.BackendError, match="no kernel for meta"):
        ops.layer_norm(x.to("meta"), w.to("meta"), None, EPS)
    ops.explain(reset=True)
    assert ops.layer_norm(random(2, 0, seed=0), torch.ones(0), None, EPS).shape == (
        2,
        0,
    )  # falls back, and says so
    (decision,) = ops.explain().decisions
    assert decision.refused["native"] == "the extension needs at least one channel"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, away from the repository's root, where `kernels` would be importable."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
    )


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set_in_short(isa: str) -> None:
    """The results of each kind of kernel; the rest of these files again is in `make test-slow`."""
    kinds = ("", "_attention", "_linear", "_quantized")
    files = [str(Path(__file__).with_name(f"test_native{kind}.py")) for kind in kinds]
    passes_with(isa, *files, chosen="(close and not gradients) or bound or long_sums or rows_do")


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set(isa: str) -> None:
    """This file again, in a process that is told to use another instruction set than the best."""
    chosen = "close or 16_bit or depend or beyond or stay or equal_channels or far_from_zero"
    passes_with(isa, __file__, chosen=f"({chosen}) and not eager")
    assert (
        run(
            "from minilm.ops.backends import native; print(native.cpu_isa())", MINILM_CPU_ISA=isa
        ).stdout.strip()
        == isa
    )


def test_an_instruction_set_that_cannot_be_had_is_an_error() -> None:
    done = run("import minilm.ops", MINILM_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "MINILM_CPU_ISA=sse9: unknown instruction set; expected one of generic" in done.stderr


def test_without_the_extension_the_reference_runs_and_the_reason_is_told() -> None:
    done = run(
        "import sys; sys.modules['minilm._C'] = None\n"
        "import torch\n"
        "from minilm import ops\n"
        "print(ops.backends.native.unavailable)\n"
        "print(ops.backends.native.cpu_isa(), ops.backends.native.cpu_isas())\n"
        "ops.add_layer_norm(torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), None, 1e-5)\n"
        "print(ops.explain().backends('add_layer_norm'))\n"
        "with ops.backend('native'):\n"
        "    ops.layer_norm(torch.ones(2, 8), torch.ones(8), None, 1e-5)\n"
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("the extension minilm._C is not built"), done.stderr
    assert lines[1:] == ["None []", "{'reference'}"]
    assert "BackendError" in done.stderr.splitlines()[-1]
    assert lines[0] in done.stderr.splitlines()[-1]


def test_reasons_why_it_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("invalid ELF header", name=name)

    monkeypatch.setattr("importlib.import_module", broken)
    assert native._load() == (None, "the extension minilm._C does not load: invalid ELF header")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    extension, reason = native._load()
    assert extension is None
    assert reason is not None
    assert "needs PyTorch 2.10 or later, and this is 2.9.1+cpu" in reason
