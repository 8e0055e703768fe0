"""The CUDA ops on a GPU, against the specification; small enough for compute-sanitizer."""

from __future__ import annotations

from typing import Any

import cuda_cases as cases
import pytest
import torch
from hypothesis import given

from minilm import ops
from minilm.ops.backends import cuda

pytestmark = pytest.mark.gpu
GPU = "cuda"


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> None:
    reason = cuda.load() if torch.cuda.is_available() else None
    if reason is not None:
        pytest.skip(reason)


@given(case=cases.decodes)
def test_decode_attention(case: dict[str, Any]) -> None:
    cases.decode(GPU, **case)


@given(case=cases.appends)
def test_rope_and_append(case: dict[str, Any]) -> None:
    cases.append(GPU, **case)


@given(case=cases.linears)
def test_linear(case: dict[str, Any]) -> None:
    cases.linear(GPU, **case)


@given(case=cases.draws)
def test_sampling(case: dict[str, Any]) -> None:
    cases.draw(GPU, **case)


def test_the_table_chooses_the_kernels() -> None:
    """Through minilm.ops, on a stream of its own."""
    q = cases.random(1, 4, 64, seed=0, dtype=cases.HALF).to(GPU)
    pages = [cases.random(2, 16, 2, 64, seed=i, dtype=cases.HALF).to(GPU) for i in (1, 2)]
    table, lens = torch.tensor([[1, 0]], dtype=torch.int32, device=GPU), torch.tensor([20], dtype=torch.int32)
    ends = torch.tensor([0, 1], dtype=torch.int32, device=GPU)
    results = []
    for backend in ("native", "reference"):
        with torch.cuda.stream(torch.cuda.Stream()), ops.backend(backend):
            results.append(ops.paged_attention(q, *pages, table, ends, lens.to(GPU), 1, 20, scale=0.125))
            torch.cuda.current_stream().synchronize()
    torch.testing.assert_close(*results, rtol=4e-3, atol=4e-3)


def test_a_step_is_captured_in_a_graph() -> None:
    """Nothing waits for the device, and a replay sees what was written since."""
    logits = torch.zeros(2, 100, device=GPU)
    given_options = cases.options(2, GPU, temperature=0.0)
    cuda.sample(logits, **given_options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = cuda.sample(logits, **given_options)
    logits[0, 7] = logits[1, 42] = 1
    graph.replay()
    assert tokens.tolist() == [7, 42]
