"""ops.linear_cross_entropy in eager PyTorch, chunk by chunk: what a training loop on a CPU uses."""

from __future__ import annotations

import pytest
import torch
from close import assert_as_good_as_eager, assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, seeds
from torch import Tensor

from minilm import ops


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(T: int, V: int, C: int, ignored: float, ignore_index: int, seed: int) -> tuple[Tensor, ...]:
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.linspace(0, 1, T) < ignored, ignore_index, labels)
    return draw(seed + 1, T, C) + 0.5, draw(seed + 2, V, C) * C**-0.5, labels


def run(backend: str, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
    with ops.backend(backend):
        loss = ops.linear_cross_entropy(*leaves, labels, ignore_index)
    return [loss.detach(), *torch.autograd.grad(loss * 3, leaves)]


@examples(30)
@given(
    st.sampled_from([1, 15, 16, 17, 49, 130]), st.sampled_from([1, 2, 17, 300]), st.sampled_from([1, 16, 24]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 0.5, 1.1]), st.sampled_from([-100, 0]), seeds(),
)  # fmt: skip
def test_errs_no_more_than_twice_the_plain_formula(
    T: int, V: int, C: int, dtype: torch.dtype, ignored: float, ignore_index: int, seed: int
) -> None:
    hidden, weight, labels = problem(T, V, C, ignored, ignore_index, seed)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    exact = run("reference", hidden.double(), weight.double(), labels, ignore_index)
    eager = run("reference", hidden, weight, labels, ignore_index)
    ours = run("torch", hidden, weight, labels, ignore_index)
    for name, a, b, e in zip(("loss", "hidden", "weight"), ours, eager, exact, strict=True):
        if name == "loss" and e.isnan():
            assert a.isnan()
            continue
        unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        floor = torch.finfo(a.dtype).eps * float(e.abs().max()) + 4 * unit * max(
            1.0, float(weight.abs().max())
        )
        assert_as_good_as_eager(a, b, e, floor=floor, what=name)


def test_gradients_against_differences() -> None:
    """Over two chunks, one label that does not count."""
    hidden, weight, labels = problem(20, 5, 3, 0.1, -100, 0)
    with ops.backend("torch"):
        assert torch.autograd.gradcheck(
            lambda h, w: ops.linear_cross_entropy(h, w, labels),
            (hidden.requires_grad_(), weight.requires_grad_()),
        )


def test_it_is_what_runs_on_a_cpu() -> None:
    hidden, weight, labels = problem(20, 5, 3, 0.1, -100, 0)
    ops.explain(reset=True)
    ops.linear_cross_entropy(hidden, weight, labels)
    assert ops.explain().backends("linear_cross_entropy") == {"torch"}


def test_the_logits_are_never_held() -> None:
    """Nothing half as large as [T, V] is allocated, where the plain formula makes more than one."""
    hidden, weight, labels = problem(640, 500, 16, 0.1, -100, 0)

    def largest(backend: str) -> int:
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            run(backend, hidden, weight, labels, -100)
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    whole = 640 * 500 * hidden.itemsize
    assert largest("reference") >= whole
    assert largest("torch") < whole / 2


def test_a_second_backward_finds_the_gradients_unspoilt() -> None:
    hidden, weight, labels = problem(20, 5, 3, 0.1, -100, 0)
    hidden.requires_grad_()
    with ops.backend("torch"):
        loss = ops.linear_cross_entropy(hidden, weight, labels)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(first, second)
    assert first.any()


def test_autocast() -> None:
    hidden, weight, labels = problem(20, 50, 8, 0.1, -100, 0)
    exact = run("reference", hidden, weight, labels, -100)
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = (run(b, hidden.float(), weight.float(), labels, -100) for b in ("reference", "torch"))
    for a, b, e in zip(ours, eager, exact, strict=True):
        assert a.dtype == torch.float32
        assert_as_good_as_eager(a, b, e, floor=2**-8 * max(1.0, float(e.abs().max())))


def test_compiles_as_one_graph() -> None:
    hidden, weight, labels = problem(20, 5, 3, 0.1, -100, 0)
    hidden.requires_grad_()

    def loss(h: Tensor) -> Tensor:
        return ops.linear_cross_entropy(h.square(), weight, labels)

    with ops.backend("torch"):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert_close(compiled(hidden), loss(hidden), atol=1e-12)
        found, expected = (torch.autograd.grad(f(hidden), hidden)[0] for f in (compiled, loss))
    assert_close(found, expected, atol=1e-12)


def test_a_training_step_lowers_the_loss() -> None:
    """As the docstring says: the body, and the head's weight."""
    import minilm

    torch.manual_seed(0)
    config = minilm.LlamaConfig(hidden_size=12, num_attention_heads=3, num_hidden_layers=1, vocab_size=20)
    model = minilm.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(20, (1, 9))
    optimiser, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        hidden = model.model(ids, use_cache=False).last_hidden_state[0]
        loss = ops.linear_cross_entropy(hidden[:-1], model.head.decoder.weight, ids[0, 1:])
        plain = model(ids, labels=ids, use_cache=False).loss
        assert_close(loss, plain, atol=1e-5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(ValueError, match="labels must be"):
        ops.linear_cross_entropy(hidden, model.head.decoder.weight, ids[0, 1:])
