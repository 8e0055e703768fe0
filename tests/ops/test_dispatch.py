"""The choice between implementations: what is asked for runs or is refused, and what ran can be told."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pairs import model_of
from strategies import small
from torch import Tensor

import minilm
from minilm import ops
from minilm.ops import dispatch
from minilm.ops.backends import native

OP = "gated"
"""An op that the tests give implementations to."""


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """A dispatch table that is put back afterwards."""
    copy = {op: dict(found) for op, found in dispatch._table.items()}
    monkeypatch.setattr(dispatch, "_table", copy)
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(dispatch, "_unavailable", {})
    return copy


def mark(value: float) -> Any:
    """An implementation that can be told from others."""
    return lambda x, activation: torch.full_like(x[..., ::2], value)


def only_float32(traits: Any) -> str | None:
    return None if traits.dtype == torch.float32 else f"knows float32 only, not {traits.dtype}"


@pytest.fixture
def three(table: dict[str, dict[str, Any]]) -> None:
    """native for float32, torch for everything, and the reference; no triton."""
    table[OP].clear()
    dispatch.register(dispatch.Implementation(OP, "native", mark(1.0), only_float32))
    dispatch.register(dispatch.Implementation(OP, "torch", mark(2.0)))
    dispatch.register(dispatch.Implementation(OP, "reference", mark(4.0)))


def ran(dtype: torch.dtype = torch.float32) -> float:
    """Which implementation a call gets."""
    return float(ops.gated(torch.zeros(1, 2, dtype=dtype), "silu"))


@pytest.mark.usefixtures("three")
def test_automatic_choice_is_in_order_and_passes_over() -> None:
    assert ran() == 1.0
    assert ran(torch.float64) == 2.0


@pytest.mark.usefixtures("three")
def test_explicit_choice_is_kept_or_refused() -> None:
    with ops.backend("reference"):
        assert ran() == ran(torch.float64) == 4.0
    with ops.backend("native"):
        assert ran() == 1.0
        with pytest.raises(ops.BackendError, match=r"gated.*cpu.*float64.*native: knows float32 only"):
            ran(torch.float64)
    with (
        ops.backend("triton"),
        pytest.raises(ops.BackendError, match="no triton implementation of gated"),
    ):
        ran()
    assert ran() == 1.0


@pytest.mark.usefixtures("three")
def test_several_backends_are_tried_in_the_order_given() -> None:
    with ops.backend("native", "reference"):
        assert (ran(), ran(torch.float64)) == (1.0, 4.0)
    with ops.backend("reference", "native"):
        assert ran() == 4.0
    with ops.backend("triton", "native"):
        assert ran() == 1.0
        with pytest.raises(ops.BackendError, match=r"triton: there is no .*native: knows float32"):
            ran(torch.float64)


@pytest.mark.usefixtures("three")
def test_one_op_is_ruled_alone_and_blocks_nest() -> None:
    with ops.backend(gated="torch"):
        assert ran() == 2.0
        ops.linear(torch.ones(1, 2), torch.ones(2, 2))  # goes on with the automatic choice
        with ops.backend("reference"):  # says something of every op
            assert ran() == 4.0
            with ops.backend(gated=("native", "torch")):
                assert (ran(), ran(torch.float64)) == (1.0, 2.0)
            assert ran() == 4.0
            with ops.backend("auto"):
                assert ran() == 1.0
        assert ran() == 2.0
    assert ran() == 1.0


@pytest.mark.usefixtures("three")
def test_choice_ends_with_the_block_even_after_an_error() -> None:
    with pytest.raises(KeyError), ops.backend("torch"):
        raise KeyError
    assert ran() == 1.0


@pytest.mark.usefixtures("three")
def test_choice_is_of_one_thread() -> None:
    found: dict[str, float] = {}
    started, chosen = threading.Barrier(3, timeout=600), threading.Barrier(3, timeout=600)

    def run(name: str) -> None:
        started.wait()
        with ops.backend(name):
            chosen.wait()
            found[name] = ran()
            chosen.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("torch", "reference")]
    for thread in threads:
        thread.start()
    started.wait()
    chosen.wait()
    assert ran() == 1.0
    chosen.wait()
    for thread in threads:
        thread.join()
    assert found == {"torch": 2.0, "reference": 4.0}


@pytest.mark.usefixtures("three")
def test_explain_tells_what_ran_and_why_the_others_did_not() -> None:
    ops.explain(reset=True)
    assert str(ops.explain()) == "no op of minilm has run yet"
    ran()
    ran()
    ran(torch.float64)
    text = str(minilm.explain())
    assert "gated: native (2 calls; device=cpu, dtype=float32" in text
    assert "gated: torch (1 call; device=cpu, dtype=float64" in text
    assert "not native: knows float32 only, not torch.float64" in text
    assert "not reference: comes later in the order of preference" in text
    assert ops.explain().backends(OP) == {"native", "torch"}
    with ops.backend("reference"):
        ran()
    assert "not torch: not requested (chosen: reference)" in str(ops.explain())
    kept = ops.explain(reset=True)
    assert kept.backends(OP) == {"native", "torch", "reference"}
    assert ops.explain().backends(OP) == set()
    assert {d.calls for d in kept.decisions} == {2, 1}, "an explanation does not change afterwards"


@pytest.mark.usefixtures("three")
def test_what_does_not_run_is_not_counted() -> None:
    ops.explain(reset=True)
    with ops.backend("native"), pytest.raises(ops.BackendError):
        ran(torch.float64)
    assert ops.explain().decisions == []


@pytest.mark.usefixtures("three")
def test_later_registration_replaces_and_is_seen_at_once() -> None:
    assert ran() == 1.0
    dispatch.register(dispatch.Implementation(OP, "native", mark(7.0)))
    assert ran() == ran(torch.float64) == 7.0


@pytest.mark.usefixtures("table")
def test_backend_that_is_absent_says_why() -> None:
    dispatch._table[OP].pop("native", None)
    dispatch.register_unavailable("native", "the extension is not built")
    with ops.backend("native"), pytest.raises(ops.BackendError, match="native: the extension is not built"):
        ran()
    ran()
    assert "not native: the extension is not built" in str(ops.explain())


def test_unknown_names_are_refused() -> None:
    expected = "unknown backend 'cuda'; expected one of native, triton, torch, reference"
    with pytest.raises(ValueError, match=expected), ops.backend("cuda"):
        pass
    with (
        pytest.raises(ValueError, match=r"unknown op 'atention'; .*attention"),
        ops.backend(atention="torch"),
    ):
        pass
    with pytest.raises(ValueError, match="unknown backend 'fast'"), ops.backend(attention="fast"):
        pass
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        dispatch.register(dispatch.Implementation(OP, "fast", mark(0.0)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "{'reference'}"),
        ("auto", "{'BEST'}"),
        ("", "{'BEST'}"),
        (" torch , reference ", "{'torch'}"),
        ("reference,torch", "{'reference'}"),
        (
            "fused",
            "BackendError: MINILM_BACKEND=fused: unknown backend 'fused'; expected one of native, triton",
        ),
    ],
)
def test_environment(value: str, expected: str) -> None:
    """MINILM_BACKEND rules a process in which nothing else is said; a name that does not exist is an error
    at first use."""
    code = """
import torch
from minilm import ops
ends = torch.tensor([0, 2], dtype=torch.int32)
def run():
    ops.attention(*[torch.ones(2, 1, 4)] * 3, ends, ends, 2, 2, scale=1.0, causal=True)
try:
    run()
    print(ops.explain(reset=True).backends("attention"))
    with ops.backend("reference"):
        run()
    assert ops.explain().backends("attention") == {"reference"}
except ops.BackendError as error:
    print("BackendError:", error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(MINILM_BACKEND=value),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    best = "native" if native.unavailable is None else "torch"
    assert expected.replace("BEST", best) in run.stdout


def environment(**values: str) -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", **values}


def test_every_op_has_a_reference_that_takes_everything() -> None:
    """And no implementation says that it supports what it does not name the op for."""
    assert set(dispatch.ops()) >= {
        "attention",
        "layer_norm",
        "rms_norm",
        "rope",
        "paged_attention",
        "cross_entropy",
    }
    for op in dispatch.ops():
        found = dispatch.implementations(op)
        assert "reference" in found, op
        for name, implementation in found.items():
            assert (implementation.op, implementation.backend) == (op, name)
        assert found["reference"].supports(None) is None, op


def test_log_sum_exp_of_a_fused_kernel_is_refused() -> None:
    ends = torch.tensor([0, 2], dtype=torch.int32)
    q: Tensor = torch.ones(2, 1, 4)
    with ops.backend("torch"), pytest.raises(ops.BackendError, match=r"torch: .*log-sum-exp"):
        ops.attention_with_lse(q, q, q, ends, ends, 2, 2, scale=1.0, causal=True)
    out, lse = ops.attention_with_lse(q, q, q, ends, ends, 2, 2, scale=1.0, causal=True)
    assert lse.shape == (1, 2)
    assert out.shape == (2, 1, 4)


def test_models_follow_the_choice() -> None:
    """The whole model on the reference gives what the automatic choice gives, and nothing else has run."""

    model, ids = model_of(small("llama"), 0), torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        automatic = model(ids).logits
        ops.explain(reset=True)
        with minilm.backend("reference"):
            plain = model(ids).logits
    torch.testing.assert_close(plain, automatic, rtol=0, atol=1e-5)
    assert {d.chosen.backend for d in ops.explain().decisions} == {"reference"}
