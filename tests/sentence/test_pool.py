"""The native pooling: the modules' results, whatever the lengths; what is left to the modules, and why; what
the raw op refuses."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from close import assert_as_good_as_eager
from hypothesis import given
from hypothesis import strategies as st
from native_runs import at_the_end, examples, guarded, random, require_extension, with_threads
from torch import Tensor, nn

from minilm import ops
from minilm.model.batch import Packed
from minilm.sentence.modules import Dense, Features, Module, Normalize, Pooling, run_modules


@pytest.fixture(autouse=True)
def _extension_is_there() -> None:
    require_extension()


def features_of(lengths: list[int], channels: int, dtype: torch.dtype = torch.float32) -> Features:
    """Hidden states whose channels have means from -3 to 3."""
    tokens = random(sum(lengths), channels, seed=channels) + torch.linspace(-3, 3, channels)
    positions = (
        torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.int64)
    )
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    packed = Packed(len(lengths), max(lengths, default=0), None, lengths, ends, positions)
    return Features(tokens.to(dtype), packed)


def run(modules: list[Module], features: Features, backend: str = "native") -> Tensor:
    with torch.no_grad(), ops.backend(backend):
        fresh = Features(features.tokens, features.packed, features.prompt_length)
        return run_modules(modules, fresh).get("sentence_embedding")


def modules_of(channels: int, unit: bool) -> list[Module]:
    return [Pooling(channels), *([Normalize()] if unit else [])]


@examples(60)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 300]), max_size=6),
    channels=st.sampled_from([1, 3, 16, 31, 33, 384]),
    unit=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_pooling_is_close(lengths: list[int], channels: int, unit: bool, dtype: torch.dtype) -> None:
    features, modules = features_of(lengths, channels, dtype), modules_of(channels, unit)
    ops.explain(reset=True)
    actual = run(modules, features)
    assert ops.explain().backends("pool") == {"native"}
    eager = run(modules, features, "reference")
    wide = Features(features.tokens.double(), features.packed)
    exact = run(modules, wide, "reference")
    assert actual.dtype == eager.dtype == dtype
    floor = 4 * torch.finfo(dtype).eps * (float(exact.abs().max()) if exact.numel() else 0.0)
    assert_as_good_as_eager(actual, eager, exact, floor=floor)


def test_a_text_does_not_depend_on_the_others_or_on_threads() -> None:
    lengths = [5, 0, 200, 64, 1, 700, 33]
    features, modules = features_of(lengths, 384), modules_of(384, unit=True)
    whole = run(modules, features)
    assert not whole[1].any()
    for other in with_threads(lambda: run(modules, features)):
        assert torch.equal(other, whole)
    for i, part in enumerate(features.tokens.split(lengths)):
        alone = features_of([lengths[i]], 384)
        alone.tokens = part
        assert torch.equal(run(modules, alone)[0], whole[i])


def test_zeros_and_what_is_no_number() -> None:
    features, modules = features_of([2, 3], 8), modules_of(8, unit=True)
    features.tokens[:2] = 0
    features.tokens[3, 5] = torch.nan
    y = run(modules, features)
    assert not y[0].any()
    assert y[1].isnan().all()


class Doubled(Normalize):
    """Somebody's own."""

    def forward(self, features: Features) -> Features:
        features.sentence = features.get("sentence_embedding") * 2
        return features


@pytest.mark.parametrize(
    "modules",
    [
        [],
        [Normalize("token_embeddings")],
        [Pooling(8, "cls")],
        [Pooling(8, ["mean", "max"])],
        [Pooling(8), Dense(8, 8)],
        [Pooling(8), Doubled()],
        [Pooling(8), Normalize("token_embeddings")],
        [Pooling(8), Normalize(), Normalize()],
        [Pooling(8, include_prompt=False), Normalize()],
    ],
    ids=str,
)
def test_what_is_left_to_the_modules(modules: list[Module]) -> None:
    features = features_of([3, 5], 8)
    features.prompt_length = 2
    expected = Features(features.tokens, features.packed, 2)
    with torch.no_grad():
        for module in modules:
            expected = module(expected)
        ops.explain(reset=True)
        found = run_modules(modules, features)
    assert not ops.explain().backends("pool")
    assert torch.equal(found.tokens, expected.tokens)
    if expected.sentence is not None:
        assert torch.equal(found.get("sentence_embedding"), expected.sentence)


@pytest.mark.parametrize("unit", [False, True])
def test_the_op_is_what_the_modules_are(unit: bool) -> None:
    """In eager PyTorch, number by number: the reference is the specification of the fast path."""
    features, modules = features_of([3, 0, 5], 8), modules_of(8, unit)
    expected = Features(features.tokens, features.packed)
    for module in modules:
        expected = module(expected)
    assert torch.equal(run(modules, features, "reference"), expected.get("sentence_embedding"))


def test_what_the_extension_leaves_to_the_reference() -> None:
    x, ends_ = torch.ones(4, 8), ends(0, 4)
    for example, why in ((x.double(), "float64"), (x.clone().requires_grad_(), "no derivative")):
        ops.explain(reset=True)
        ops.pool(example, ends_)
        (decision,) = [d for d in ops.explain().decisions if d.op == "pool"]
        assert why in decision.refused["native"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pool: x must be \[tokens, channels\], and is \[4\]"):
        ops.pool(torch.ones(4), ends(0, 4))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 4"):
        ops.pool(torch.ones(4, 8), ends(0, 3))


def test_hooks_and_gradients_are_left_to_the_modules() -> None:
    modules = modules_of(8, unit=True)
    seen: list[nn.Module] = []
    handle = modules[1].register_forward_hook(lambda module, *_: seen.append(module))
    run(modules, features_of([3], 8), "auto")
    assert seen == [modules[1]]
    handle.remove()
    features = features_of([3, 1], 8)
    x = features.tokens.requires_grad_()
    run_modules(modules, features).get("sentence_embedding").sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def ends(*numbers: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


@pytest.mark.parametrize(
    ("x", "cu_seqlens", "message"),
    [
        (torch.ones(4, 8).double(), ends(0, 4), "x must be"),
        (torch.ones(4), ends(0, 4), "x must be"),
        (torch.ones(8, 4).T, ends(0, 4), "x must be"),
        (torch.ones(4, 8), ends(0, 4, dtype=torch.int64), "cu_seqlens must be"),
        (torch.ones(4, 8), torch.zeros(0, dtype=torch.int32), "cu_seqlens must be"),
        (torch.ones(4, 8), ends(0, 4).view(1, 2), "cu_seqlens must be"),
        (torch.ones(4, 8), ends(0, 5), "must rise"),
        (torch.ones(4, 8), ends(1, 4), "must rise"),
        (torch.ones(4, 8), ends(0, 3), "must rise"),
        (torch.ones(4, 8), ends(0, 3, 2, 4), "must rise"),
        (torch.ones(4, 8), ends(0, -1, 4), "must rise"),
        (torch.ones(4, 8), ends(0, 2**31 - 1, 4), "must rise"),
    ],
)
def test_the_op_refuses_what_does_not_fit(x: Tensor, cu_seqlens: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.minilm.pool(x, cu_seqlens, True)


def test_nothing_behind_a_tensor_is_read() -> None:
    arguments: dict[str, Any] = {"x": random(7, 33, seed=1), "cu_seqlens": ends(0, 2, 7)}
    expected = torch.ops.minilm.pool(*arguments.values(), True)
    for name, value in arguments.items():
        with guarded(value.nbytes) as memory:
            found = torch.ops.minilm.pool(*(arguments | {name: at_the_end(memory, value)}).values(), True)
        assert torch.equal(found, expected)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.minilm.pool.default, (random(7, 33, seed=1), ends(0, 2, 7), True))
