"""The CUDA kernels, run on a CPU thread by thread, against the specification. No GPU, no nvcc is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_cases as cases
import pytest
import torch
from close import assert_as_good_as_eager
from cuda_emulation import LIBRARY, driver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilm import ops
from minilm.ops import dispatch, reference
from minilm.ops.backends import cuda
from minilm.ops.quantized import dequantise, quantise

pytestmark = pytest.mark.slow  # it compiles the kernels
CPU = "cpu"
kept = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(autouse=True, params=["rising", "falling"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulated ops stand for those of the GPU; threads run in both orders, so a missing barrier shows."""
    driver().falling(request.param == "falling")
    monkeypatch.setattr(cuda, "LIBRARY", LIBRARY)
    yield
    driver().falling(0)


@kept
@given(case=cases.decodes)
def test_decode_attention(case: dict[str, Any]) -> None:
    cases.decode(CPU, **case)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("head_dim", cases.HEADS)
def test_decode_attention_of_every_head_size(head_dim: int, group: int, int8: bool) -> None:
    for dtype in (cases.HALF, cases.BF16):
        shape = {"head_dim": head_dim, "group": group, "kv_heads": 2, "lengths": [70, 1], "page_size": 16}
        cases.decode(CPU, dtype=dtype, int8=int8, window=None, splits=2, mean=0.5, seed=head_dim, **shape)


@pytest.mark.parametrize("group", [1, 3])
def test_the_number_of_splits_does_not_matter(group: int) -> None:
    q, k, v = (
        cases.random(*shape, seed=i) for i, shape in enumerate([(1, 2 * group, 64), *[(9, 32, 2, 64)] * 2])
    )
    table, lens = torch.randperm(9).int()[None], torch.tensor([270], dtype=torch.int32)
    q, k, v = q.half(), k.half(), v.half()
    op = getattr(torch.ops, LIBRARY).decode_attention
    one, *more = (op(q, k, v, table, lens, 270, 0.125, None, None, None, n) for n in (1, 2, 7, 128, None))
    for other in more:
        torch.testing.assert_close(other, one, rtol=2e-3, atol=2e-4)


@kept
@given(case=cases.appends)
def test_rope_and_append(case: dict[str, Any]) -> None:
    cases.append(CPU, **case)


@kept
@given(case=cases.linears)
def test_linear(case: dict[str, Any]) -> None:
    cases.linear(CPU, **case)


@pytest.mark.parametrize("format", [None, "q4_1"])
def test_linear_with_more_inputs_than_a_block_holds(format: str | None) -> None:
    shape = {"rows": 8, "out": 40, "groups": 130, "less": 0, "gated": False, "bias": True, "residual": True}
    cases.linear(CPU, cases.BF16, format, norm="rms_norm", activation=None, mean=1.0, seed=0, **shape)


@pytest.mark.parametrize("format", ["int8", "q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("rows", [1, 13])
def test_quantized_linear(format: str, rows: int) -> None:
    columns = 44 if format == "int8" else 96  # int8 rows need not be a multiple of anything
    weight = quantise(cases.random(24, columns, seed=1), format)
    x = cases.random(rows, columns, seed=2, dtype=cases.HALF).view(1, rows, columns)
    bias = cases.random(24, seed=3)
    y = cuda.quantized_linear(x, weight, bias, "silu")
    exact = reference.linear(x.double(), dequantise(weight, torch.float64), bias.double(), "silu")
    eager = reference.linear(x, dequantise(weight, cases.HALF), bias.half(), "silu")
    assert_as_good_as_eager(y, eager, exact)
    before = cuda.kept(weight)
    assert cuda.kept(weight) is before, "packed once"
    weight.codes.zero_()
    assert cuda.kept(weight) is not before, "and again when it has changed"


@kept
@given(case=cases.draws)
def test_sampling(case: dict[str, Any]) -> None:
    cases.draw(CPU, **case)


def test_sampling_draws_each_token_as_often_as_it_should() -> None:
    rows, probabilities = 400, torch.tensor([0.1, 0.5, 0.0, 0.4])
    logits = probabilities.log().expand(rows, 4).contiguous()
    tokens = cuda.sample(logits, **cases.options(rows, CPU, seed=5, sequence=torch.arange(rows), step=3))
    found = tokens.bincount(minlength=4)
    assert found[2] == 0
    deviation = (rows * probabilities * (1 - probabilities)).sqrt()
    assert ((found - rows * probabilities).abs() <= 4 * deviation + 1e-6).all(), found


def test_scores_from_which_nothing_can_be_drawn() -> None:
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[0.0, nan, 1.0], [-inf, -inf, -inf], [0.0, inf, inf], [-0.0, 0.0, -1.0]])
    drawn = cuda.sample(logits, **cases.options(4, CPU, top_k=1)).tolist()
    assert drawn[:3] == [-1, -1, -1]
    assert drawn[3] in (0, 1)
    assert cuda.sample(logits, **cases.options(4, CPU, temperature=0.0)).tolist()[:3] == [-1, -1, 1]


def test_what_is_malformed_raises() -> None:
    op = getattr(torch.ops, LIBRARY)
    q, pages = torch.zeros(2, 4, 64).half(), torch.zeros(3, 16, 2, 64).half()
    table, lens = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    rest = (table, lens, 48, 1.0)
    for wrong, reason in (
        ((q.float(), pages, pages, *rest), "float16 or bfloat16"),
        ((q, pages.bfloat16(), pages.bfloat16(), *rest), "of the type"),
        ((q, pages, pages[:2], *rest), r"\[3, 16, 2, 64\], and is \[2, 16, 2, 64\]"),
        ((q, pages, pages, table[:1], lens, 48, 1.0), r"block_table must be \[2, 3\]"),
        ((q, pages, pages, table.long(), lens, 48, 1.0), "int32"),
        ((q, pages, pages, table, lens, 49, 1.0), "room for 48"),
        ((q, pages, pages, *rest, 0), "window must be at least 1"),
        ((q, pages.to(torch.int8), pages.to(torch.int8), *rest), "come with k_scales"),
        ((q[..., :48], pages[..., :48].contiguous(), pages[..., :48].contiguous(), *rest), "head size"),
        ((q[:, :3], pages, pages, *rest), "cannot be shared evenly"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            op.decode_attention(*wrong)
    x = torch.zeros(2, 64).half()
    for call, reason in (
        (lambda: op.linear(torch.zeros(9, 64).half(), x, 0, 2), "up to 8"),
        (lambda: op.linear(x, x[:, :32], 0, 2), r"weight must be \[2, 64\]"),
        (lambda: op.linear(x, x, 3, 2), "weight must be"),
        (lambda: op.linear(x, x, 0, 2, norm=1), "needs norm_weight"),
        (lambda: op.linear(x[:, :60], x[:, :60], 0, 2), "multiple of 8"),
        (lambda: op.pack(torch.zeros(2, 40, dtype=torch.uint8), 72), "groups of 32"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            call()


def test_the_ops_are_what_pytorch_is_told() -> None:
    """Schemas, fakes and what is mutated, by PyTorch's own check."""
    op = getattr(torch.ops, LIBRARY)
    q, k, v = (cases.random(3, heads, 32, seed=heads, dtype=cases.HALF) for heads in (4, 2, 2))
    pages = [torch.zeros(2, 4, 2, 32).half() for _ in range(2)]
    angles = torch.zeros(3, 16)
    slots = torch.tensor([1, 5, 2])
    table, lens = torch.tensor([[0, 1]] * 3, dtype=torch.int32), torch.tensor([3, 1, 8], dtype=torch.int32)
    weight = quantise(cases.random(16, 64, seed=0), "q4_0")
    packed, x = cuda.pack(weight), cases.random(2, 64, seed=1, dtype=cases.HALF)
    sampled = cases.options(3, CPU)
    torch.library.opcheck(op.rope_append, (q, k, v, angles, angles, *pages, slots))
    torch.library.opcheck(op.append_kv, (k, v, *pages, slots))
    torch.library.opcheck(op.decode_attention, (q, *pages, table, lens, 8, 1.0, None))
    for plane in (weight.codes, weight.scale):
        torch.library.opcheck(op.pack, (plane, 64))
    torch.library.opcheck(op.linear, (x, packed.codes, packed.kind, 16, packed.scale))
    torch.library.opcheck(op.sample, (cases.random(3, 50, seed=2), *sampled.values()))


@given(
    single=st.booleans(),
    head_dim=st.sampled_from([48, 64]),
    dtype=st.sampled_from([torch.float32, cases.HALF]),
)
@kept
def test_what_a_kernel_cannot_do_is_said(single: bool, head_dim: int, dtype: torch.dtype) -> None:
    traits = ops.PagedTraits("cuda", dtype, dtype, head_dim, 2, 16, window=False, single_query=single)
    decode, append = cuda.supports_decode(traits), cuda.supports_append(traits)
    assert (decode is None) == (single and head_dim == 64 and dtype == cases.HALF), decode
    assert (append is None) == (dtype == cases.HALF), append


def test_one_implementation_for_two_devices() -> None:
    made = [
        ops.Implementation(
            "linear", "native", lambda x, name=name: name, lambda traits, name=name: f"no: {name}"
        )
        for name in ("cuda", "cpu")
    ]
    both, alone = cuda.by_device(*made), cuda.by_device(made[0], None, lambda: "it is not built")
    on = {device: ops.PointwiseTraits(device, torch.float32) for device in ("cuda", "cpu")}
    assert both.call(torch.ones(1)) == "cpu"
    assert both.supports(on["cuda"]) == "no: cuda"
    assert both.supports(on["cpu"]) == "no: cpu"
    assert alone.supports(on["cuda"]) == "it is not built"
    assert alone.supports(on["cpu"]) == "the extension has no kernel for cpu"


def test_nothing_changes_where_it_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    added: list[ops.Implementation] = []
    monkeypatch.setattr(dispatch, "register", added.append)
    monkeypatch.setattr(cuda, "FILE", tmp_path / "_C_cuda.abi3.so")
    cuda.register_all()
    assert not added
    (tmp_path / "_C_cuda.abi3.so").write_text("no library")
    cuda.load.cache_clear()
    cuda.register_all()
    assert {i.op for i in added} == {"paged_attention", "rope_append", "append_kv", "quantized_linear"}
    traits = ops.PagedTraits("cuda", cases.HALF, cases.HALF, 64, 2, 16, window=False, single_query=True)
    assert str(added[0].supports(traits)).startswith("the CUDA part of the extension does not load: ")
    cuda.load.cache_clear()
