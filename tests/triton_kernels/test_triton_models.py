"""Whole models of every family on the Triton kernels, in the interpreter: logits, loss and gradients against
float64, by the factor-2 rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from close import assert_as_good_as_eager
from pairs import model_of
from strategies import DECODERS, FAMILIES, small
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import minilm
from minilm import ops

LENGTHS = (7, 1, 4)


def batch() -> dict[str, Tensor]:
    """Three padded rows, with labels."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(4, 41, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(model: Any, *backends: str) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every parameter of one training step."""
    call = batch()
    model.zero_grad()
    with minilm.backend(*backends):
        out = model(**call, **({"use_cache": False} if model.spec.causal else {}))
        out.loss.backward()
    found = {"logits": out.logits[call["attention_mask"].bool()].detach(), "loss": out.loss.detach()}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_on_triton(ran: Any, *expected: str) -> None:
    """Whatever has a Triton kernel ran on it, the `expected` ops among them."""
    for op in {decision.op for decision in ran.decisions}:
        if "triton" in ops.dispatch.implementations(op):
            assert ran.backends(op) == {"triton"}, ran
    for op in expected:
        assert ran.backends(op) == {"triton"}, f"{op}: {ran}"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step(family: str) -> None:
    model = model_of(small(family), 0)
    exact = step(copy.deepcopy(model).double(), "reference")
    eager = step(model, "reference")
    minilm.explain(reset=True)
    ours = step(model, "triton", "reference")
    spec = model.spec
    norm = "rms_norm" if spec.norm_plus_one else f"add_{spec.norm}"
    expected = ["attention", norm, "cross_entropy"]
    expected += ["rope"] * (spec.rope is not None) + ["gated" if spec.gated_mlp else "linear"]
    assert_on_triton(minilm.explain(), *expected)
    assert ours.keys() == eager.keys() == exact.keys()
    for name, found in ours.items():
        # What cancels in the sum over the tokens leaves the rounding of its terms.
        floor = 16 * torch.finfo(torch.float32).eps * max(1.0, float(exact[name].abs().max()))
        assert_as_good_as_eager(found, eager[name], exact[name], floor=floor, what=name)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f == "llama" else pytest.mark.slow) for f in DECODERS]
)
def test_a_prompt_and_three_steps_with_the_cache(family: str) -> None:
    """Logits of each step against those of the whole text in float64."""
    model = model_of(small(family), 0)
    ids = torch.randint(4, 41, (2, 8), generator=torch.Generator().manual_seed(1))

    def steps(*backends: str) -> Tensor:
        with torch.no_grad(), minilm.backend(*backends):
            out = model(ids[:, :5], use_cache=True)
            logits = [out.logits]
            for at in range(5, 8):
                out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                logits.append(out.logits)
        return torch.cat(logits, dim=1)

    with torch.no_grad(), minilm.backend("reference"):
        exact = copy.deepcopy(model).double()(ids, use_cache=False).logits
    minilm.explain(reset=True)
    ours = steps("triton", "reference")
    spec = model.spec
    append = "append_kv" if spec.rope is None or spec.rotated < spec.head_dim else "rope_append"
    paged = ["paged_attention"] * (spec.attention_soft_cap is None)  # it has none: pages are gathered
    assert_on_triton(minilm.explain(), "attention", *paged, append)
    floor = 16 * torch.finfo(torch.float32).eps * max(1.0, float(exact.abs().max()))
    assert_as_good_as_eager(ours, steps("reference"), exact, floor=floor)


def test_half_precision() -> None:
    """An encoder in bfloat16, as it runs on a GPU."""
    model = model_of(small("bert"), 0)
    call = {name: x for name, x in batch().items() if name != "labels"}
    with torch.no_grad():
        with minilm.backend("reference"):
            exact = copy.deepcopy(model).double()(**call).logits
            eager = model.bfloat16()(**call).logits
        with minilm.backend("triton", "reference"):
            ours = model(**call).logits
    real = call["attention_mask"].bool()
    floor = 4 * torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    assert_as_good_as_eager(ours[real], eager[real], exact[real], floor=floor)
