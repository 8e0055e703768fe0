"""Steps of decoding in one native call: the same results as module by module, whatever the family, the batch,
the threads; which token is the best; several steps in one call; what it leaves to the modules, and why; what
changes are seen; what the raw op refuses."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from close import assert_as_good_as_eager
from fused_models import (
    DECODERS,
    QUANTISED_ERROR,
    WIDE,
    batch,
    ints,
    model_of,
    quantise_blocks,
    quantised_linear,
)
from native_runs import OTHER_ISAS, at_the_end, guarded, passes_with, require_extension, with_threads
from tiny_decoders import EOS, decoder, prompts
from tiny_decoders import batch as padded
from torch import Tensor, nn

import minilm
from minilm import ops
from minilm.cache import KVCache
from minilm.generation.engine import Engine, Request
from minilm.generation.sampling import Sampling
from minilm.model import angle_table
from minilm.native import blocks as fused
from minilm.native import steps as decode_step
from minilm.ops.quantized import quantise
from minilm.quantized import QuantizedEmbedding

NATIVE = {"names": ("native",)}
MODULES = {"names": ("native",), "decode_step": "torch"}
"""The same kernels, called by the modules."""
REFERENCE = {"names": ("reference",)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BATCHES: dict[int, list[int]] = {
    1: [37],
    3: [31, 5, 64],
    5: [1, 32, 33, 7, 96],
    13: [1 + 13 * i % 50 for i in range(13)],
    120: [1 + 7 * i % 40 for i in range(120)],
}
"""Rows that every thread keeps for itself, few, and many; pages have 32 tokens."""


@pytest.fixture(autouse=True)
def _extension_is_there() -> None:
    require_extension()


def chosen(how: dict[str, Any]) -> Any:
    return ops.backend(*how["names"], **{k: v for k, v in how.items() if k != "names"})


def begun(
    model: Any, lengths: list[int], cache: torch.dtype | None = None, how: dict[str, Any] = NATIVE
) -> KVCache:
    """A cache in which every sequence has a random prompt."""
    tokens, packed = batch(lengths)
    found: KVCache = model.new_cache(len(lengths), dtype=cache)
    with torch.no_grad(), chosen(how):
        model.run_packed(tokens, packed, cache=found, rows=found.rows)
    return found


def go_on(
    model: Any,
    cache: KVCache,
    count: int = 3,
    how: dict[str, Any] = NATIVE,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Logits [count, B, V] of some random tokens more, one a step; the cache is left as it was."""
    cache = copy.deepcopy(cache)
    tokens = batch([len(cache.rows)] * count, seed=1)[0].view(count, -1)
    rows = cache.rows if rows is None else rows
    found = []
    with torch.inference_mode(), chosen(how):
        for some in tokens[:, rows]:
            logits, best = model.step(some, rows, cache)
            assert best.dtype == torch.int64
            assert torch.equal(best, logits.argmax(-1))
            found.append(logits)
    return torch.stack(found)


def assert_close(
    model: Any, lengths: list[int], cache: torch.dtype | None = None, count: int = 3, factor: float = 2.0
) -> None:
    """At most twice as far from float64 as the modules on the reference are."""
    actual = go_on(model, begun(model, lengths, cache), count)
    eager = go_on(model, begun(model, lengths, cache, REFERENCE), count, REFERENCE)
    double = copy.deepcopy(model).double()
    exact = go_on(double, begun(double, lengths, None, REFERENCE), count, REFERENCE)
    floor = 4 * torch.finfo(eager.dtype).eps * float(exact.abs().max())
    assert_as_good_as_eager(actual, eager, exact, floor=floor, factor=factor)


def assert_same(model: Any, cache: KVCache, count: int = 3) -> None:
    """Bit by bit what the modules make of it with the same kernels, and so is what is left in the cache."""
    ops.explain(reset=True)
    actual = go_on(model, cache, count)
    assert {d.op for d in ops.explain().decisions} == {"decode_step"}
    assert torch.equal(actual, go_on(model, cache, count, MODULES))


# The same results


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in ("gpt2", "llama", "qwen3") else pytest.mark.slow) for f in DECODERS],
)
def test_a_step_is_that_of_the_modules(family: str, tied: bool) -> None:
    """All kernels add in the same order, and float32 is rounded nowhere in between."""
    model = model_of(family, tie_word_embeddings=tied)
    assert (model.head.decoder is None) == tied
    for size in (3, 13):
        assert_same(model, begun(model, BATCHES[size]))
        assert_close(model, BATCHES[size])


@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_batch_of_any_size_is_that_of_the_modules(family: str, size: int) -> None:
    model = model_of(family)
    assert_same(model, begun(model, BATCHES[size]))
    for other in with_threads(lambda: go_on(model, begun(model, BATCHES[size])), (1, 4)):
        assert torch.equal(other, go_on(model, begun(model, BATCHES[size]), 3, MODULES))


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow), "mistral"])
def test_contexts_across_pages_and_stretches(family: str) -> None:
    """512 keys are cut into sixteen stretches of 32, 513 into eleven of 48."""
    lengths = [31, 63, 255, 1, 390] if family == "gpt2" else [31, 63, 511, 1, 700]
    model = model_of(family)
    assert_same(model, begun(model, lengths))
    assert_close(model, lengths)


@pytest.mark.parametrize(
    ("dtype", "cache"),
    [
        pytest.param(dtype, cache, marks=() if dtype == cache else pytest.mark.slow)
        for dtype, cache in itertools.product(FLOATS, FLOATS)
    ],
    ids=str,
)
def test_16_bit_weights_and_caches_are_close(dtype: torch.dtype, cache: torch.dtype) -> None:
    for family in ("gpt2", "llama", "qwen3"):
        model = model_of(family).to(dtype)
        found = go_on(model, begun(model, [31, 5, 40], cache))
        assert found.dtype == dtype
        if dtype == torch.float32:  # else the modules round between their layers
            assert_same(model, begun(model, [31, 5, 40], cache))
        assert_close(model, [31, 5, 40], cache)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen3"])
def test_a_cache_of_int8_is_that_of_the_modules(family: str) -> None:
    """Bit by bit, prompt and steps; close to what a cache of floats gives, and not the same."""
    model = model_of(family)
    for lengths in ([31, 5, 40], [300], [60] * 13):
        eight = begun(model, lengths, torch.int8)
        assert_same(model, eight)
        for ours, theirs in zip(
            (*eight.stores(), *eight.scale_stores()),
            (*(other := begun(model, lengths, torch.int8, MODULES)).stores(), *other.scale_stores()),
            strict=True,
        ):
            used = sorted({page for pages in eight._pages_of.values() for page in pages[:-1]})
            assert torch.equal(ours[:, used], theirs[:, used])
        expected = go_on(model, begun(model, lengths))
        error = (go_on(model, eight) - expected).norm() / expected.norm()
        assert 0 < error < 0.03


def test_scaled_rope_is_that_of_the_modules() -> None:
    for scaling in (
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ):
        model = model_of("llama", rope_parameters={"rope_theta": 1e4, **scaling})
        assert_same(model, begun(model, [70, 3]))


def test_a_long_context_has_angles_of_its_own() -> None:
    """The table of angles begins with 512 positions and doubles."""
    model = model_of("llama", num_hidden_layers=1)
    cache = begun(model, [1022, 510])
    assert_same(model, cache, 4)


# Quantised weights


def quantised_model(family: str, blocks: str | None, ends: str | None, tied: bool) -> Any:
    """Layers in one format; token table and head in another. None leaves them as they are."""
    wide = {"n_embd": 64, "n_inner": 96, "n_head": 4} if family == "gpt2" else WIDE
    model = model_of(family, **wide, tie_word_embeddings=tied)
    if blocks is not None:
        quantise_blocks(model, blocks)
    if ends is not None:
        table = model.body.embeddings.tokens
        model.body.embeddings.tokens = QuantizedEmbedding(quantise(table.weight, ends), table.weight.dtype)
        if not tied:
            model.head.decoder = quantised_linear(model.head.decoder, ends)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("format", QUANTISED_ERROR)
@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_quantised_models_are_close(family: str, format: str, tied: bool) -> None:
    for blocks, ends in ((format, format), (None, format), (format, None)):
        model = quantised_model(family, blocks, ends, tied)
        lengths = BATCHES[5]
        expected = go_on(model, begun(model, lengths, None, REFERENCE), 3, REFERENCE)
        actual = go_on(model, begun(model, lengths))
        error = (actual - expected).norm() / expected.norm()
        assert 0 < error < QUANTISED_ERROR[format]
        assert_same(model, begun(model, lengths))


@pytest.mark.parametrize("format", ["int8", "q8_0", "q4_0", "q4_1"])
def test_a_checkpoint_quantised_as_it_is_loaded_steps_natively(format: str, tmp_path: Any) -> None:
    """The tables of 4-bit models are in q8_0, and what does not fit stays as it is."""
    model_of("llama", **WIDE).save_pretrained(tmp_path)
    model = minilm.AutoModelForCausalLM.from_pretrained(tmp_path, weights=format)
    assert isinstance(model.body.embeddings.tokens, QuantizedEmbedding)
    assert_same(model, begun(model, [31, 5, 40]))


def test_a_quantised_model_in_16_bits_is_as_good_as_the_modules() -> None:
    model = quantised_model("llama", "q8_0", "q8_0", tied=True).to(torch.bfloat16)
    expected = go_on(model, begun(model, [31, 5], None, REFERENCE), 3, REFERENCE)
    actual = go_on(model, begun(model, [31, 5]))
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() / expected.norm() < QUANTISED_ERROR["q8_0"]


# What a sequence does not depend on


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_a_sequence_does_not_depend_on_its_batch_or_the_order(family: str) -> None:
    model = model_of(family)
    cache = begun(model, [40, 7, 300, 31, 2, 33])
    whole = go_on(model, cache)
    for rows in ([0], [3], [2, 1], [5, 4, 3, 2, 1, 0], [4, 0, 5, 1]):
        part = go_on(model, cache, rows=rows)
        assert torch.equal(part, whole[:, rows])


def test_a_step_does_not_depend_on_threads() -> None:
    model = model_of("llama")
    for lengths in ([300], [40, 7, 300], BATCHES[120]):
        cache = begun(model, lengths)
        first, *others = with_threads(lambda c=cache: go_on(model, c))
        assert all(torch.equal(first, other) for other in others)


def test_nan_stays_in_its_sequence() -> None:
    model = model_of("llama")
    cache = begun(model, [40, 7, 33])
    clean = go_on(model, cache)
    cache.stores()[0][0, cache._pages_of[1][0], 3, 0, 5] = torch.nan
    found = go_on(model, cache)
    assert found[:, 1].isnan().all()
    found[:, 1] = clean[:, 1]
    assert torch.equal(found, clean)


# The best token


@pytest.mark.parametrize("size", [1, 3, 13])
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 41, 64, 1003])
def test_the_best_token_is_the_first_of_the_highest(vocabulary: int, size: int) -> None:
    """Equal rows of the head give equal logits, wherever they stand."""
    model = model_of("llama", tie_word_embeddings=False, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(vocabulary)
    kinds = torch.randn(3, 40, generator=generator)
    cache = begun(model, BATCHES[size])
    tokens = batch([size], seed=3)[0]
    for seed in range(4):
        order = torch.randint(3, (vocabulary,), generator=torch.Generator().manual_seed(seed))
        model.head.decoder = minilm.model.layers.Linear(40, vocabulary, bias=False).requires_grad_(False)
        model.head.decoder.weight.copy_(kinds[order])
        with torch.no_grad(), ops.backend("native"):
            logits, best = model.step(tokens, cache.rows, copy.deepcopy(cache))
        assert torch.equal(best, logits.argmax(-1))
        for row, token in zip(logits.tolist(), best.tolist(), strict=True):
            assert token == row.index(max(row))


@pytest.mark.parametrize("places", [(0,), (13, 30), (40,), (31, 32, 40), (7, 5)])
def test_the_first_nan_is_the_best(places: tuple[int, ...]) -> None:
    model = model_of("llama", tie_word_embeddings=False)
    cache = begun(model, [5, 9])
    model.head.decoder.weight[list(places)] = torch.nan
    with torch.no_grad(), ops.backend("native"):
        logits, best = model.step(ints(4, 5, dtype=torch.int64), cache.rows, cache)
    assert best.tolist() == [min(places)] * 2
    assert torch.equal(best, logits.argmax(-1))


# Several steps in one call


def go_far(
    model: Any, cache: KVCache, count: int, how: dict[str, Any] = NATIVE, ends: Sequence[int] = ()
) -> tuple[Tensor, Tensor, KVCache]:
    """`steps` on a copy of the cache: logits, tokens, and the copy."""
    cache = copy.deepcopy(cache)
    start = batch([len(cache.rows)], seed=1)[0]
    with torch.inference_mode(), chosen(how):
        logits, found = model.steps(start, cache.rows, cache, count, ends)
    assert found.dtype == torch.int64
    return logits, found, cache


def one_by_one(model: Any, cache: KVCache, count: int) -> tuple[Tensor, Tensor]:
    """Each step a call of its own: the logits of the last, and all tokens."""
    cache = copy.deepcopy(cache)
    tokens, found = batch([len(cache.rows)], seed=1)[0], []
    with torch.inference_mode(), ops.backend("native"):
        for _ in range(count):
            logits, tokens = model.step(tokens, cache.rows, cache)
            found.append(tokens)
    return logits, torch.stack(found)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_several_steps_are_as_many_calls(family: str, dtype: torch.dtype) -> None:
    """Across the borders of pages, and as the modules make them with the same kernels."""
    model = model_of(family).to(dtype)
    for lengths in ([37], [31, 5, 64], [60, 1] * 7):
        cache = begun(model, lengths)
        logits, tokens, after = go_far(model, cache, 6)
        expected, one = one_by_one(model, cache, 6)
        assert torch.equal(tokens, one)
        assert torch.equal(logits, expected)
        assert after.lengths == {row: length + 6 for row, length in cache.lengths.items()}
        if dtype == torch.float32:  # else the modules round between their layers
            slow, found, other = go_far(model, cache, 6, MODULES)
            assert torch.equal(found, tokens)
            assert torch.equal(slow, logits)
            assert torch.equal(go_on(model, other), go_on(model, after))


@pytest.mark.parametrize("how", [NATIVE, MODULES], ids=["native", "modules"])
def test_a_step_that_gives_an_end_is_the_last(how: dict[str, Any]) -> None:
    model = model_of("gpt2")
    cache = begun(model, BATCHES[13])
    _, tokens, _ = go_far(model, cache, 8)
    before = set()
    tried = 0
    for step, row in enumerate(tokens.tolist()):
        for end in set(row) - before:
            tried += 1
            logits, found, after = go_far(model, cache, 8, how, [end, 10**6])
            assert torch.equal(found, tokens[: step + 1])
            assert torch.equal(logits, one_by_one(model, cache, step + 1)[0])
            assert after.lengths == {row: length + step + 1 for row, length in cache.lengths.items()}
            for place, length in after.lengths.items():
                assert len(after._pages_of[place]) == -(-length // after.page_size)
        before |= set(row)
    assert tried > 3


def test_texts_written_several_tokens_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("llama").ours
    greedy = Sampling(do_sample=False)
    drawn = Sampling(seed=3)
    counts: list[int] = []
    steps = model.steps

    def counted(*arguments: Any) -> Any:
        counts.extend([arguments[3]] if arguments[3] > 1 else [])
        return steps(*arguments)

    monkeypatch.setattr(model, "steps", counted)

    def written(at_once: bool, rule: Sampling, ends: frozenset[int], stop: int | None) -> Any:
        requests = [
            Request(p, rule, new, ends, at_once=at_once)
            for p, new in zip(prompts([4, 30, 9]), (21, 5, 13), strict=True)
        ]
        if stop is not None:
            sample = requests[0].samples[0]
            sample.watch = lambda token: "stop" if len(sample.tokens) == stop else None
        engine = Engine(model, keep_rows=True)
        for request in requests:
            engine.add(request)
        engine.run()
        samples = [sample for request in requests for sample in request.samples]
        return [(s.tokens, s.finish_reason, s.stop_reason, engine.cache.lengths[s.row]) for s in samples]

    with ops.backend("native"):
        free = written(False, greedy, frozenset(), None)
        assert counts == []
        end = free[0][0][10]
        for ends, stop in ((frozenset[int](), None), (frozenset([end]), None), (frozenset([end]), 4)):
            expected = written(False, greedy, ends, stop)
            assert counts == []
            assert written(True, greedy, ends, stop) == expected
            assert counts[0] == 4, "the second text writes four after its first"
            assert len(counts) < 12
            counts.clear()
        assert written(True, drawn, frozenset(), None) == written(False, drawn, frozenset(), None)
        assert counts == []


def test_end_tokens_that_come_too_early_end_a_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken then is not the likeliest token."""
    model = decoder("llama").ours
    end = sequences("llama", NATIVE, eos_token_id=None).sequences[1, 36]
    rule = Sampling(do_sample=False, min_new_tokens=9, ends=frozenset([int(end)]))
    found = []
    for at_once in (False, True):
        request = Request(prompts([4, 19, 33, 1])[1], rule, 12, frozenset([int(end)]), at_once=at_once)
        engine = Engine(model)
        engine.add(request)
        with ops.backend("native"):
            engine.run()
        found.append(request.samples[0].tokens)
    assert found[0] == found[1]
    assert int(end) not in found[0][:9]


# Whole texts


def sequences(family: str, how: dict[str, Any], **options: Any) -> Any:
    ops.explain(reset=True)
    with chosen(how):
        result = decoder(family).ours.generate(
            **padded(prompts([4, 19, 33, 1])),
            **{"max_new_tokens": 8, "do_sample": False, **options},
            return_dict_in_generate=True,
        )
    assert ops.explain().backends("decode_step") == {how["names"][0]}
    return result


@pytest.mark.parametrize("family", DECODERS)
def test_texts_are_those_of_the_reference(family: str) -> None:
    options = {"eos_token_id": None, "max_new_tokens": 6}
    expected = sequences(family, REFERENCE, **options).sequences
    assert torch.equal(sequences(family, NATIVE, **options).sequences, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 5},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"do_sample": True, "seed": 3, "temperature": 0.7, "top_k": 5, "num_return_sequences": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_texts_by_other_rules_are_those_of_the_reference(options: dict[str, Any]) -> None:
    expected = sequences("llama", REFERENCE, **options).sequences
    assert torch.equal(sequences("llama", NATIVE, **options).sequences, expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_logits_of_texts_are_those_of_the_reference(family: str) -> None:
    options = {"output_logits": True, "output_scores": True, "eos_token_id": None}
    expected, actual = (sequences(family, how, **options) for how in (REFERENCE, NATIVE))
    assert torch.equal(actual.sequences, expected.sequences)
    for name in ("logits", "scores"):
        torch.testing.assert_close(
            torch.stack(actual[name]), torch.stack(expected[name]), atol=1e-3, rtol=1e-4
        )


def test_an_end_token_that_comes_too_early_is_ruled_out() -> None:
    """The likeliest token of the step is then not what is taken: in that row alone."""
    free = sequences("llama", NATIVE, eos_token_id=None).sequences[:, 33:]
    end = int(free[1, 3])  # what the second text wants to write in its fourth step
    options = {"eos_token_id": end, "pad_token_id": EOS, "min_new_tokens": 6}
    expected = sequences("llama", REFERENCE, **options).sequences
    actual = sequences("llama", NATIVE, **options).sequences
    assert torch.equal(actual, expected)
    assert end not in actual[:, 33:39].tolist()[1]
    assert int(actual[1, 36]) != end


def test_log_probabilities_are_those_of_the_reference() -> None:
    found = []
    for how in (REFERENCE, NATIVE):
        greedy = Sampling(do_sample=False)
        requests = [Request(p, greedy, 8, logprobs=3) for p in prompts([4, 19, 33])]
        requests.append(Request(prompts([6])[0], Sampling(seed=1), 8, n=2))
        with chosen(how):
            engine = Engine(decoder("qwen2").ours)
            for request in requests:
                engine.add(request)
            engine.run()
        samples = [sample for request in requests for sample in request.samples]
        found.append([(s.tokens, s.logprobs) for s in samples])
    for (tokens, logs), (expected, expected_logs) in zip(*found, strict=True):
        assert tokens == expected
        for one, other in zip(logs, expected_logs, strict=True):
            assert one.keys() == other.keys()
            for token, (value, rank) in one.items():
                assert rank == other[token][1]
                assert value == pytest.approx(other[token][0], abs=1e-3)


# What is left to the modules


def refusal(
    model: Any, cache: KVCache | None = None, guard: Any = torch.no_grad, allowed: str = "torch"
) -> str:
    """Why the native step did not run, and that the modules' did as well."""
    cache = begun_by_any(model) if cache is None else cache
    ops.explain(reset=True)
    with guard():
        model.step(ints(4, 5, dtype=torch.int64), cache.rows, copy.deepcopy(cache))
    (decision,) = (d for d in ops.explain().decisions if d.op == "decode_step")
    assert decision.chosen.backend == allowed
    return decision.refused["native"]


def begun_by_any(model: Any, dtype: torch.dtype | None = None) -> KVCache:
    return begun(model, [5, 9], dtype, {"names": ("auto",)})


class Scaled(nn.Embedding):
    """A table of somebody's own."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 2

    def scores(self, hidden: Tensor) -> Tensor:
        return ops.linear(hidden, self.weight)


class OwnHead(nn.Module):
    """A head of somebody's own."""

    decoder: nn.Module | None = None

    def forward(self, hidden: Tensor, tokens: Any) -> Tensor:
        scores: Tensor = tokens.scores(hidden) * 2
        return scores


def test_explain_shows_the_step() -> None:
    model = model_of("llama")
    cache = begun_by_any(model)
    ops.explain(reset=True)
    for _ in range(2):
        with torch.no_grad():
            model.step(ints(4, 5, dtype=torch.int64), cache.rows, cache)
    assert "decode_step: native (2 calls; device=cpu, dtype=float32)" in str(ops.explain())


def test_gradients_are_left_to_the_modules() -> None:
    model = model_of("llama").requires_grad_(True)
    cache = begun_by_any(model)
    assert "gradients are enabled" in refusal(model, cache, nullcontext)
    logits, _ = model.step(ints(4, 5, dtype=torch.int64), cache.rows, copy.deepcopy(cache))
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(logits, go_with(model, cache), atol=1e-4, rtol=1e-4)


def go_with(model: Any, cache: KVCache) -> Tensor:
    """One step of given tokens by the modules on PyTorch's ops."""
    with torch.no_grad(), ops.backend("torch", "reference"):
        logits: Tensor = model.step(ints(4, 5, dtype=torch.int64), cache.rows, copy.deepcopy(cache))[0]
    return logits


def test_dtypes_that_the_extension_does_not_have_are_left_to_the_modules() -> None:
    model = model_of("llama")
    assert "no kernel for a cache in torch.float64" in refusal(model, begun_by_any(model, torch.float64))
    assert "no kernel for torch.float64" in refusal(model_of("llama").double())
    mixed = model_of("llama", tie_word_embeddings=False)
    mixed.head.decoder.double()
    with torch.no_grad():
        assert "weights in torch.float64" in str(decode_step.look(mixed))
        mixed.head.decoder.float()
        assert not isinstance(decode_step.look(mixed), str)
    positions = model_of("gpt2")
    positions.body.embeddings.positions.double()
    with torch.no_grad():
        assert "weights in torch.float64" in str(decode_step.look(positions))


def test_what_is_replaced_is_left_to_the_modules() -> None:
    model = model_of("llama", tie_word_embeddings=True)
    cache = begun_by_any(model)
    native = go_on(model, cache)
    table = model.body.embeddings.tokens
    model.body.embeddings.tokens = Scaled(41, 40, _weight=table.weight)
    assert "replaced by a Scaled" in refusal(model, cache)
    model.body.embeddings.tokens = table
    assert torch.equal(go_on(model, cache), native)
    head = model.head
    model.head = OwnHead()
    assert "the embeddings or the head were replaced" in refusal(model, cache)
    model.head = head
    model.head = nn.Identity()
    with torch.no_grad():
        assert "the head were replaced" in str(decode_step.look(model))
    model.head = head
    head.decoder = nn.Linear(40, 41, bias=False)
    assert "replaced by a Linear" in refusal(model, cache)
    head.decoder = None
    assert torch.equal(go_on(model, cache), native)


@pytest.mark.parametrize("place", ["", "body.embeddings", "body.embeddings.tokens", "head", "head.decoder"])
def test_hooks_are_left_to_the_modules(place: str) -> None:
    model = model_of("llama", tie_word_embeddings=False)
    cache = begun_by_any(model)
    native = go_on(model, cache)
    seen = []
    module = model.get_submodule(place)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *a: seen.append(1))
        assert "forward hooks" in refusal(model, cache)
        assert seen or not place, "nobody calls the model itself"
        handle.remove()
        seen.clear()
        assert torch.equal(go_on(model, cache), native)


def test_hooks_in_the_blocks_are_seen_at_the_next_step() -> None:
    model = model_of("llama")
    cache = begun_by_any(model)
    seen = []
    handle = model.body.layers[1].mlp.register_forward_hook(lambda *a: seen.append(1))
    assert "forward hooks" in refusal(model, cache)
    assert seen
    handle.remove()
    assert torch.equal(go_on(model, begun_by_any(model)), go_on(model, begun_by_any(model), 3, MODULES))


def test_what_the_blocks_leave_to_the_modules_the_step_does_too() -> None:
    assert "activation mish" in refusal(model_of("llama", hidden_act="mish"))
    assert "there are no layers" in refusal(model_of("llama", num_hidden_layers=0))
    model = model_of("llama")
    cache = begun_by_any(model)
    with torch.no_grad():
        model(batch([6])[0].view(1, -1), output_hidden_states=True)
    assert torch.equal(go_on(model, cache), go_on(model, cache, 3, MODULES))


def test_dynamic_rope_is_left_to_the_modules() -> None:
    model = model_of("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert "dynamic rope" in refusal(model)


def test_dropout_is_left_to_the_modules() -> None:
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model = model_of("gpt2", **off, embd_pdrop=0.5).train()
    assert "dropout is on" in refusal(model)
    assert "dropout is on" in refusal(model_of("gpt2", embd_pdrop=0.0, attn_pdrop=0.5).train())
    none = model_of("gpt2", **off, embd_pdrop=0.0).train()
    assert torch.isfinite(go_on(none, begun_by_any(none))).all()


@pytest.mark.slow
def test_a_compiled_step_is_traced() -> None:
    model = model_of("gpt2")
    cache = begun_by_any(model)
    expected = go_with(model, cache)
    ops.explain(reset=True)
    compiled = torch.compile(model.step, backend="eager")
    with torch.no_grad():
        actual, best = compiled(ints(4, 5, dtype=torch.int64), cache.rows, cache)
    assert "native" not in ops.explain().backends("decode_step")
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(best, actual.argmax(-1))


def test_what_keeps_the_step_from_the_kernels_is_looked_for_at_little_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights are packed once, and nothing walks through the blocks."""
    model = model_of("llama")
    cache = begun_by_any(model)
    go_on(model, cache)
    monkeypatch.setattr(decode_step, "_look", None)
    monkeypatch.setattr(fused, "_obstacle", None)
    monkeypatch.setattr(nn.Module, "modules", None)
    go_on(model, cache)


# What changes


def write_table(model: Any) -> None:
    model.body.embeddings.tokens.weight[4:6] += 1


def write_positions(model: Any) -> None:
    model.body.embeddings.positions.weight += 0.5


def write_head(model: Any) -> None:
    model.head.decoder.weight[7] *= 2


def exchange_parameter(model: Any) -> None:
    model.head.decoder.weight = nn.Parameter(torch.ones(41, 40))


def exchange_data(model: Any) -> None:
    model.head.decoder.weight.data = torch.ones(41, 40)


def exchange_table(model: Any) -> None:
    model.body.embeddings.tokens.weight.data = torch.ones(41, 40)


def exchange_module(model: Any) -> None:
    model.head.decoder = minilm.model.layers.Linear(40, 41, bias=False)
    torch.nn.init.normal_(model.head.decoder.weight, generator=torch.Generator().manual_seed(3))


def resize(model: Any) -> None:
    model.resize_token_embeddings(50)


def shrink(model: Any) -> None:
    model.resize_token_embeddings(9)


def load(model: Any) -> None:
    model.load_state_dict(
        {k: v * 1.5 if "layers" not in k else v for k, v in model.state_dict().items()}, strict=True
    )


def other_dtype(model: Any) -> None:
    model.head.to(torch.bfloat16)
    model.body.embeddings.to(torch.float16)


@pytest.mark.parametrize(
    "change",
    [
        write_table,
        write_positions,
        write_head,
        exchange_parameter,
        exchange_data,
        exchange_table,
        exchange_module,
        resize,
        shrink,
        load,
    ],
    ids=lambda f: f.__name__,
)
def test_what_changes_around_the_blocks_is_seen(change: Any) -> None:
    model = model_of("gpt2", tie_word_embeddings=False)
    cache = begun_by_any(model)
    tokens = ints(4, 5, dtype=torch.int64)

    def one(how: dict[str, Any]) -> Tensor:
        with torch.no_grad(), chosen(how):
            logits: Tensor = model.step(tokens, cache.rows, copy.deepcopy(cache))[0]
        return logits

    before = one(NATIVE)
    assert torch.equal(one(NATIVE), before)
    with torch.no_grad():
        change(model)
    after = one(NATIVE)
    assert not torch.equal(before, after)
    assert torch.equal(after, one(MODULES))


def test_another_dtype_is_seen() -> None:
    model = model_of("llama", tie_word_embeddings=False)
    cache = begun_by_any(model)
    before = go_on(model, cache)
    model.to(torch.bfloat16)
    rounded = begun_by_any(model)
    assert go_on(model, rounded).dtype == torch.bfloat16
    model.float()
    cache = begun_by_any(model)
    assert_same(model, cache)
    assert not torch.equal(go_on(model, cache), before)


def test_quantised_tables_that_are_written_to_are_seen() -> None:
    model = quantised_model("llama", None, "q4_1", tied=False)
    for plane in ("codes", "scale", "minimum"):
        for module in (model.body.embeddings.tokens, model.head.decoder):
            cache = begun_by_any(model)
            before = go_on(model, cache)
            getattr(module, plane).add_(1)
            after = go_on(model, cache)
            assert not torch.equal(before, after)
            assert torch.equal(after, go_on(model, cache, 3, MODULES)), (plane, type(module).__name__)


def test_a_copy_goes_its_own_way() -> None:
    model = model_of("gpt2")
    cache = begun_by_any(model)
    before = go_on(model, cache)
    twin = copy.deepcopy(model)
    twin.body.embeddings.tokens.weight.mul_(2)
    twin.body.layers[0].mlp.up.weight.zero_()
    assert torch.equal(go_on(model, cache), before)
    cache = begun_by_any(twin)
    assert_same(twin, cache)


# What the raw op refuses


def raw(family: str = "llama", format: str | None = None) -> dict[str, Any]:
    """Arguments of one call: three sequences of 5, 9 and 40 tokens, in pages of 32."""
    model = quantised_model(family, None, format, tied=False)
    cache = begun(model, [4, 8, 39])
    with torch.no_grad():
        found = decode_step.look(model)
    assert not isinstance(found, str)
    (arena, layout), ends = found
    step = cache.extend(cache.rows, [1, 1, 1])
    spec = model.spec
    cos, sin = (None, None) if spec.rope is None else angle_table(spec.rope, spec.head_dim, 40)
    # Where no token has written, the memory holds anything: NaN too, which equals nothing, itself included.
    k_cache, v_cache = (torch.where(store.abs() < 100, store, 0.5) for store in cache.stores())
    return {
        "tokens": torch.tensor([4, 40, 7]),
        "table": ends.table[0].clone(),
        "scale": ends.table[1],
        "minimum": ends.table[2],
        "position_table": None if ends.positions is None else ends.positions[:40].clone(),
        "position_offset": 0,
        "cos": cos,
        "sin": sin,
        "arena": arena,
        "layout": layout,
        "head": ends.head.data,
        "head_format": ends.head.format,
        "vocabulary": ends.head.columns,
        "logits_format": 0,
        "ends": torch.tensor([17]),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slots": step.slots,
        "block_table": step.block_table,
        "context_lens": step.context_lens,
    }


def call(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.minilm.decode_steps(*arguments.values())
    return result


PAGES = (2, 4, 32, 2, 16)
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"tokens": ints(4, 40, 7)}, "tokens must be int64"),
    ("llama", {"tokens": torch.ones(3, 1, dtype=torch.int64)}, "tokens must be int64"),
    ("llama", {"tokens": torch.ones(3)}, "tokens must be int64"),
    ("llama", {"tokens": torch.ones(6, dtype=torch.int64)[::2]}, "tokens must be int64"),
    ("llama", {"tokens": torch.tensor([4, 40])}, "slots must be int64"),
    ("llama", {"logits_format": -1}, "logits are float32"),
    ("llama", {"logits_format": 3}, "logits are float32"),
    ("llama", {"ends": torch.ones(2)}, "ends must be int64"),
    ("llama", {"ends": torch.ones(1, 1, dtype=torch.int64)}, "ends must be int64"),
    ("llama", {"ends": torch.tensor(3)}, "ends must be int64"),
    ("llama", {"slots": torch.zeros(0, dtype=torch.int64)}, "no slots"),
    ("llama", {"slots": ints(4, 5, 40, 41, 99, 100, dtype=torch.int64).view(3, 2)}, "slots must be int64"),
    ("llama", {"slots": ints(4, 5, 40, 41, 99, 100, 101, dtype=torch.int64)}, "slots must be int64"),
    ("llama", {"slots": ints(4, 5, 40, 41, 99, 128, dtype=torch.int64)}, "a slot lies outside"),
    (
        "llama",
        {"slots": torch.arange(18), "context_lens": ints(5, 9, 40)},
        "shorter than its new tokens",
    ),
    (
        "llama",
        {"slots": torch.arange(6), "table": torch.ones(40, 64), "tokens": torch.tensor([4, 39, 7])},
        "tokens may come that have no vector",
    ),
    ("llama", {"tokens": torch.tensor([4, 41, 7])}, "not in the vocabulary"),
    ("llama", {"tokens": torch.tensor([4, -1, 7])}, "not in the vocabulary"),
    ("llama", {"tokens": torch.tensor([4, 2**62, 7])}, "not in the vocabulary"),
    ("llama", {"tokens": torch.tensor([4, 5, 6, 7])}, "no slots"),
    ("llama", {"table": torch.ones(41, 65)}, "vectors have another length"),
    ("llama", {"table": torch.ones(41, 32, dtype=torch.uint8)}, "has scales if it holds codes"),
    ("llama", {"table": torch.ones(41, 64, dtype=torch.int8)}, "has scales if it holds codes"),
    ("llama", {"table": torch.ones(41, 64).double()}, "of floats or of codes"),
    ("llama", {"table": torch.ones(41, 64, dtype=torch.int64)}, "of floats or of codes"),
    ("llama", {"table": torch.ones(64, 41).T}, "must be contiguous"),
    ("llama", {"table": torch.ones(41 * 64)}, "must be contiguous"),
    ("llama", {"table": torch.ones(0, 64)}, "not in the vocabulary"),
    ("llama", {"scale": torch.ones(41)}, "has scales if it holds codes"),
    ("llama", {"minimum": torch.ones(41, 2).half()}, "only a table of 4-bit codes"),
    ("int8", {"scale": None}, "has scales if it holds codes"),
    ("int8", {"scale": torch.ones(40)}, "scales for every row"),
    ("int8", {"scale": torch.ones(41).half()}, "scales must be"),
    ("int8", {"scale": torch.ones(41, 2)}, "scales must be"),
    ("int8", {"scale": torch.ones(())}, "scales must be"),
    ("int8", {"scale": torch.ones(82)[::2]}, "scales must be"),
    ("int8", {"minimum": torch.ones(41, 2).half()}, "only a table of 4-bit codes"),
    ("q8_0", {"scale": torch.ones(41, 3).half()}, "scales must be"),
    ("q8_0", {"scale": torch.ones(41, 2).bfloat16()}, "scales must be"),
    ("q8_0", {"scale": torch.ones(2, 41).half().T}, "scales must be"),
    ("q8_0", {"scale": torch.ones(40, 2).half()}, "scales for every row"),
    ("q4_0", {"scale": torch.ones(41)}, "4-bit codes have a scale for each group"),
    ("q4_0", {"table": torch.ones(41, 64, dtype=torch.uint8)}, "vectors have another length"),
    ("q4_1", {"minimum": torch.ones(41, 1).half()}, "minimums must be"),
    ("q4_1", {"minimum": torch.ones(40, 2).half()}, "minimums must be"),
    ("q4_1", {"minimum": torch.ones(41, 2)}, "minimums must be"),
    ("gpt2", {"position_table": torch.ones(39, 64)}, "beyond the table of positions"),
    ("gpt2", {"position_table": torch.ones(40, 63)}, "vectors have another length"),
    ("gpt2", {"position_table": torch.ones(40, 64).double()}, "of floats or of codes"),
    ("gpt2", {"position_table": torch.ones(40, 64, dtype=torch.int8)}, "has scales"),
    ("gpt2", {"position_offset": 1}, "beyond the table of positions"),
    ("gpt2", {"position_offset": -1}, "impossible offset"),
    ("gpt2", {"position_offset": 2**63 - 1}, "impossible offset"),
    ("gpt2", {"position_offset": -(2**63)}, "impossible offset"),
    ("llama", {"cos": None}, "cos and sin come together"),
    ("llama", {"sin": None}, "cos and sin come together"),
    ("llama", {"cos": torch.ones(39, 8)}, "beyond the table of angles"),
    ("llama", {"sin": torch.ones(0, 8)}, "beyond the table of angles"),
    ("llama", {"sin": torch.ones(40, 16)}, "cos and sin must be"),
    ("llama", {"cos": torch.ones(40, 8).half()}, "cos and sin must be"),
    ("llama", {"cos": torch.ones(8, 40).T}, "cos and sin must be"),
    ("llama", {"arena": torch.ones(100)}, "the arena must be uint8"),
    ("llama", {"arena": torch.ones(0, dtype=torch.uint8)}, "outside of the arena"),
    ("llama", {"layout": ints(1, 2, 3)}, "the layout int64"),
    ("llama", {"layout": torch.ones(0, dtype=torch.int64)}, "too short"),
    ("llama", {"head": torch.ones(100)}, "was not packed"),
    ("llama", {"head": torch.ones(100, dtype=torch.uint8)}, "was not packed"),
    ("llama", {"head": torch.ones(0, dtype=torch.uint8)}, "was not packed"),
    ("llama", {"head_format": -1}, "unknown format"),
    ("llama", {"head_format": 6}, "unknown format"),
    ("llama", {"head_format": 2**32}, "unknown format"),
    ("llama", {"head_format": 1}, "was not packed"),
    ("llama", {"head_format": 4}, "was not packed"),
    ("llama", {"vocabulary": 0}, "impossible size"),
    ("llama", {"vocabulary": -41}, "impossible size"),
    ("llama", {"vocabulary": 2**31}, "impossible size"),
    ("llama", {"vocabulary": 2**31 - 1}, "was not packed"),
    ("llama", {"vocabulary": 141}, "was not packed"),
    ("llama", {"k_cache": torch.zeros(PAGES).double()}, "the cache must be float32"),
    ("llama", {"k_cache": torch.zeros(PAGES, dtype=torch.int8)}, "the cache must be \\[layers"),
    (
        "llama",
        {name: torch.zeros(PAGES, dtype=torch.int8) for name in ("k_cache", "v_cache")},
        "comes with scales",
    ),
    ("llama", {"k_cache": torch.zeros(PAGES, dtype=torch.int16)}, "the cache must be float32"),
    ("llama", {"v_cache": torch.zeros(PAGES).half()}, "keys and values alike"),
    ("llama", {"k_cache": torch.zeros(3, *PAGES[1:])}, "keys and values alike"),
    ("llama", {"v_cache": torch.zeros(2, 3, 32, 2, 16)}, "keys and values alike"),
    ("llama", {"v_cache": torch.zeros(2, 4, 32, 16, 2).mT}, "keys and values alike"),
    ("llama", {"slots": ints(4, 40, 99)}, "slots must be int64"),
    ("llama", {"slots": torch.tensor([4, 40, 128])}, "a slot lies outside"),
    ("llama", {"slots": torch.tensor([4, -1, 99])}, "a slot lies outside"),
    ("llama", {"block_table": ints(0, 1, 2).view(3, 1)}, "longer than its pages"),
    ("llama", {"block_table": ints(0, 0, 1, 0, 2, 4).view(3, 2)}, "names a page"),
    ("llama", {"block_table": ints(0, 0, -1, 0, 2, 3).view(3, 2)}, "names a page"),
    ("llama", {"block_table": ints(0, 0, 1, 0).view(2, 2)}, "block_table must be"),
    ("llama", {"block_table": torch.zeros(3, 2, dtype=torch.int64)}, "block_table must be"),
    ("llama", {"context_lens": ints(5, 9)}, "context_lens must be"),
    ("llama", {"context_lens": ints(5, 9, 40, dtype=torch.int64)}, "context_lens must be"),
    ("llama", {"context_lens": ints(5, 0, 40)}, "shorter than its new tokens"),
    ("llama", {"context_lens": ints(5, -9, 40)}, "shorter than its new tokens"),
    ("llama", {"context_lens": ints(5, 9, 65)}, "longer than its pages"),
    ("llama", {"context_lens": ints(5, 9, 2**31 - 1)}, "longer than its pages"),
]


@pytest.fixture(scope="module")
def valid() -> dict[str, dict[str, Any]]:
    """Arguments by family, or by the format of a llama's table and head."""
    found = {family: raw(family) for family in ("llama", "gpt2")}
    return found | {format: raw("llama", format) for format in QUANTISED_ERROR}


@pytest.mark.parametrize(("kind", "changed", "message"), BAD)
def test_the_op_refuses_arguments_that_do_not_fit(
    valid: dict[str, dict[str, Any]], kind: str, changed: dict[str, Any], message: str
) -> None:
    arguments = valid[kind]
    assert changed.keys() <= arguments.keys()
    call(arguments)
    kept = arguments["k_cache"].clone(), arguments["v_cache"].clone()
    with pytest.raises(RuntimeError, match=message):
        call(arguments | changed)
    assert torch.equal(kept[0], arguments["k_cache"])
    assert torch.equal(kept[1], arguments["v_cache"])


@pytest.mark.parametrize("kind", ["llama", "gpt2", *QUANTISED_ERROR])
def test_nothing_behind_a_tensor_is_read_or_written(valid: dict[str, dict[str, Any]], kind: str) -> None:
    """The last page of the cache, row of the tables, column of the head are in use."""
    arguments = valid[kind]
    arguments = arguments | {"block_table": ints(0, 0, 1, 0, 2, 3).view(3, 2)}
    arguments["slots"] = torch.tensor([4, 40, 3 * 32 + 7])
    logits, best = call(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            with guarded(value.nbytes) as memory:
                found = call(arguments | {name: at_the_end(memory, value)})
                assert torch.equal(found[0], logits), name
                assert torch.equal(found[1], best), name


def test_an_empty_batch_has_no_logits(valid: dict[str, dict[str, Any]]) -> None:
    none = {
        "tokens": torch.zeros(0, dtype=torch.int64),
        "slots": torch.zeros(0, dtype=torch.int64),
        "block_table": torch.zeros(0, 0, dtype=torch.int32),
        "context_lens": torch.zeros(0, dtype=torch.int32),
    }
    logits, best = call(valid["llama"] | none)
    assert logits.shape == (0, 41)
    assert best.shape == (1, 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", *QUANTISED_ERROR])
def test_several_steps_stay_within_their_tensors(valid: dict[str, dict[str, Any]], kind: str) -> None:
    """Two steps, of which the second stands at the last of the tables and of the pages."""
    arguments = valid[kind] | {
        "tokens": torch.tensor([4, 40, 7]),
        "slots": torch.tensor([3, 4, 39, 40, 3 * 32 + 6, 3 * 32 + 7]),
        "block_table": ints(0, 0, 1, 0, 2, 3).view(3, 2),
        "ends": torch.tensor([10**6]),
    }
    logits, best = call(arguments)
    assert best.shape == (2, 3)
    assert bool((best >= 0).all())
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            with guarded(value.nbytes) as memory:
                found = call(arguments | {name: at_the_end(memory, value)})
                assert torch.equal(found[0], logits), name
                assert torch.equal(found[1], best), name
    stopped = call(arguments | {"ends": best[0, 1:2].clone()})[1]
    assert torch.equal(stopped[0], best[0])
    assert stopped[1].tolist() == [-1] * 3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "q4_1"])
def test_opcheck(valid: dict[str, dict[str, Any]], kind: str) -> None:
    torch.library.opcheck(torch.ops.minilm.decode_steps.default, tuple(valid[kind].values()))


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHER_ISAS[:2])
def test_other_instruction_sets(isa: str) -> None:
    """This file again, in a process that is told to use shorter vectors than the best. (The kernels of a step
    have tests with every instruction set.)"""
    passes_with(isa, __file__, chosen="a_step_is_that or any_size or quantised_models or best or behind")
