"""Families with other norms, ropes and heads than Llama's (SmolLM3, OLMo 2, GPT-NeoX, Phi, Gemma), and
encoders with other traits than BERT's (ModernBERT, NomicBERT, ELECTRA, ALBERT), in native calls: prompts,
prompts in parts and decoding steps are those of the modules; so in 16 bits, with quantised weights and
caches, whatever the batch and the threads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_as_good_as_eager
from fused_models import BIDIRECTIONAL, LATER, QUANTISED_ERROR, WIDE, batch, ints, model_of, quantise_blocks
from native_runs import OTHER_ISAS, at_the_end, guarded, passes_with, require_extension, with_threads
from torch import Tensor

from minilm import ops
from minilm.cache import KVCache
from minilm.model import angle_table
from minilm.native import released
from minilm.native import steps as decode_step
from minilm.ops.quantized import quantise
from minilm.quantized import QuantizedEmbedding, QuantizedLinear

FEW = [5, 1, 0, 3]
MANY = [33, 1, 250, 0, 16, 101]
SHORT = [7 * i % 41 for i in range(66)]
"""As in test_blocks.py: few rows, blocks of rows, and whole sequences as tasks."""
SIDE_BY_SIDE = ("gpt_neox", "phi")
"""The kernels add what attention gives first, the modules both sub-layers' results to each other."""


@pytest.fixture(autouse=True)
def _extension_is_there() -> None:
    require_extension()


def run(model: Any, lengths: list[int], backend: str = "native", **options: Any) -> Tensor:
    """Hidden states of the whole batch, [T, C]."""
    with torch.no_grad(), ops.backend(backend):
        hidden: Tensor = model.run_packed(*batch(lengths), **options)
    return hidden


def begun(model: Any, lengths: list[int], dtype: torch.dtype | None = None, how: str = "native") -> KVCache:
    """A cache in which every sequence has a random prompt."""
    cache: KVCache = model.new_cache(len(lengths), dtype=dtype)
    run(model, lengths, how, cache=cache, rows=list(cache.rows))
    return cache


def go_on(
    model: Any, cache: KVCache, backend: str = "native", rows: list[int] | None = None, **by: str
) -> Tensor:
    """Logits [3, B, V] of three more tokens, one a step; the cache is left as it was."""
    cache = copy.deepcopy(cache)
    rows = list(cache.rows) if rows is None else rows
    found = []
    with torch.inference_mode(), ops.backend(backend, **by):
        for some in batch([len(cache.rows)] * 3, seed=1)[0].view(3, -1):
            logits, best = model.step(some[rows], rows, cache)
            assert torch.equal(best, logits.argmax(-1))
            found.append(logits)
    return torch.stack(found)


def assert_close(actual: Tensor, model: Any, make: Callable[[Any, str], Tensor]) -> None:
    """At most twice as far from float64 as the modules on the reference are."""
    eager = make(model, "reference")
    exact = make(copy.deepcopy(model).double(), "reference")
    floor = 4 * torch.finfo(eager.dtype).eps * float(exact.abs().max())
    assert_as_good_as_eager(actual, eager, exact, floor=floor)


@pytest.mark.parametrize("family", [*LATER, *BIDIRECTIONAL])
def test_prompts_are_those_of_the_modules(family: str) -> None:
    model = model_of(family)
    for lengths in (FEW, MANY, SHORT):
        ops.explain(reset=True)
        actual = run(model, lengths)
        projects = {"linear"} if model.body.project is not None else set()
        assert {d.op for d in ops.explain().decisions} == {"blocks", "embed", *projects}
        assert_close(actual, model, lambda m, how, n=lengths: run(m, n, how))
        for other in with_threads(lambda n=lengths: run(model, n), (1, 4)):
            assert torch.equal(other, actual)


@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_has_the_bias_that_it_has(bias: bool) -> None:
    """ModernBERT's norm_bias, in the embeddings, the layers and at the end; the layers before a stop."""
    model = model_of("modernbert", norm_bias=bias)
    norms = {name: p for name, p in model.body.named_parameters() if "norm" in name}
    assert sum(name.endswith(".bias") for name in norms) == (9 if bias else 0)
    before = run(model, MANY)
    assert_close(before, model, lambda m, how: run(m, MANY, how))
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        for stop in (1, 3):
            found = [0.0, 0.0]
            for place, how in enumerate(("native", "reference")):
                with ops.backend(how):
                    found[place] = model.body(model.pack(tokens, stop=stop))
            torch.testing.assert_close(*found, atol=2e-5, rtol=2e-5)
    for name, parameter in norms.items():
        parameter.add_(0.5)
        after = run(model, MANY)
        assert float((after - before).abs().max()) > 1e-3, name
        before = after
    assert_close(before, model, lambda m, how: run(m, MANY, how))


@pytest.mark.parametrize("family", LATER)
def test_steps_are_those_of_the_modules(family: str) -> None:
    """For one sequence, few and many, across the windows and pages."""
    model = model_of(family)
    for lengths in ([37], [31, 5, 64], [1 + 7 * i % 40 for i in range(60)]):
        cache = begun(model, lengths)
        ops.explain(reset=True)
        actual = go_on(model, cache)
        assert {d.op for d in ops.explain().decisions} == {"decode_step"}
        assert_close(actual, model, lambda m, how, n=lengths: go_on(m, begun(m, n, how=how), how))
        for other in with_threads(lambda c=cache: go_on(model, c), (1, 4)):
            assert torch.equal(other, actual)
        same = go_on(model, cache, decode_step="torch")  # the kernels, called by the modules
        if model.head.bias is None and model.head.soft_cap is None:
            assert torch.equal(actual, same)
        else:
            torch.testing.assert_close(actual, same, atol=1e-6, rtol=1e-6)
        assert torch.equal(go_on(model, cache, rows=[len(lengths) - 1]), actual[:, -1:])


@pytest.mark.parametrize("family", LATER)
def test_a_prompt_in_parts_is_the_whole_prompt(family: str) -> None:
    """The second part sees the pages of the first."""
    model = model_of(family)
    tokens, packed = batch([60])
    cache = model.new_cache(1)
    with torch.no_grad(), ops.backend("native"):
        found = []
        for begin, end in ((0, 23), (23, 58), (58, 59), (59, 60)):
            part = batch([end - begin])[1]
            part.positions = packed.positions[begin:end]
            found.append(model.run_packed(tokens[begin:end], part, cache=cache, rows=[0]))
    assert_close(torch.cat(found), model, lambda m, how: run(m, [60], how))


@pytest.mark.parametrize("family", [f for f in (*LATER, *BIDIRECTIONAL) if f not in ("gemma", "smollm3")])
def test_16_bits_are_as_good_as_the_modules(family: str) -> None:
    model = model_of(family).to(torch.bfloat16)
    for lengths in (FEW, MANY):
        actual = run(model, lengths)
        assert actual.dtype == torch.bfloat16
        assert_close(actual, model, lambda m, how, n=lengths: run(m, n, how))
    if family in BIDIRECTIONAL:
        return
    lengths = [31, 5]
    actual = go_on(model, begun(model, lengths))
    assert_close(actual, model, lambda m, how: go_on(m, begun(m, lengths, how=how), how))


def quantised(family: str, format: str) -> Any:
    sizes = {k: v for k, v in WIDE.items() if family not in SIDE_BY_SIDE or k != "head_dim"}
    model = model_of(family, **sizes)
    quantise_blocks(model, format)
    table = model.body.embeddings.tokens
    model.body.embeddings.tokens = QuantizedEmbedding(quantise(table.weight, format), table.weight.dtype)
    if model.head.decoder is not None:
        model.head.decoder = QuantizedLinear(quantise(model.head.decoder.weight, format), None)
    return model


@pytest.mark.parametrize("format", ["int8", "q8_0", "q4_1"])
@pytest.mark.parametrize("family", ["modernbert", "albert"])
def test_quantised_encoders_are_close(family: str, format: str) -> None:
    """A shared block's matrices are packed once, and their planes released once."""
    model = model_of(family, **{k: v for k, v in WIDE.items() if k != "head_dim"})
    quantise_blocks(model, format)
    expected, actual = run(model, MANY, "reference"), run(model, MANY)
    assert 0 < (actual - expected).norm() / expected.norm() < QUANTISED_ERROR[format]
    assert all(released.form_of(block.mlp.down) is not None for block in model.body.layers)
    assert torch.equal(run(model, MANY), actual)


@pytest.mark.parametrize("format", ["int8", "q8_0", "q4_1"])
@pytest.mark.parametrize("family", ["olmo2", "gpt_neox", "phi", "gemma2", "gemma3_text"])
def test_quantised_weights_are_close(family: str, format: str) -> None:
    model = quantised(family, format)
    for make in (
        lambda how: run(model, MANY, how),
        lambda how: go_on(model, begun(model, [31, 5], how=how), how),
    ):
        expected, actual = make("reference"), make("native")
        error = (actual - expected).norm() / expected.norm()
        assert 0 < error < QUANTISED_ERROR[format]


def test_a_matrix_in_the_order_of_heads_is_packed_once() -> None:
    """A layer that runs alone uses the packed form; released planes come back bit by bit."""
    model = model_of("gpt_neox")
    expected = run(model, FEW)
    with ops.backend("native", blocks="torch"), torch.no_grad():
        torch.testing.assert_close(model.run_packed(*batch(FEW)), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(run(model, FEW), expected)
    model = quantised("gpt_neox", "q8_0")
    layer = model.body.layers[1].attention.qkv
    planes = layer.codes.clone(), layer.scale.clone()
    run(model, FEW)
    assert released.form_of(layer) is not None
    assert torch.equal(layer.codes, planes[0])
    assert torch.equal(layer.scale, planes[1])


def test_a_resized_table_has_a_bias_as_long() -> None:
    model = model_of("phi")
    model.resize_token_embeddings(50)
    cache = begun(model, [12, 9])
    actual = go_on(model, cache)
    assert actual.shape[-1] == 50
    torch.testing.assert_close(actual, go_on(model, cache, "reference"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "gemma3_text"])
def test_a_cache_of_int8_is_close(family: str) -> None:
    model = model_of(family)
    expected = go_on(model, begun(model, [31, 5, 300]))
    actual = go_on(model, begun(model, [31, 5, 300], torch.int8))
    assert 0 < (actual - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_several_steps_are_as_many_calls(family: str) -> None:
    model = model_of(family)
    cache = begun(model, [37, 5])
    one, several = copy.deepcopy(cache), copy.deepcopy(cache)
    tokens, found = ints(4, 5, dtype=torch.int64), []
    with torch.inference_mode(), ops.backend("native"):
        last, best = model.steps(tokens, [0, 1], several, 6)
        for _ in range(6):
            logits, tokens = model.step(tokens, [0, 1], one)
            found.append(tokens)
    assert torch.equal(best, torch.stack(found))
    assert torch.equal(last, logits)


CHANGES: list[tuple[str, Callable[[Any], Any]]] = [
    ("gemma2", lambda m: m.body.layers[1].mlp_out_norm.weight.mul_(2)),
    ("gemma2", lambda m: setattr(m.head, "soft_cap", 0.7)),
    ("olmo2", lambda m: m.body.layers[0].attention.q_norm.weight[3].mul_(3)),
    ("phi", lambda m: m.head.bias.add_(ints(*range(41)))),
    ("gpt_neox", lambda m: m.body.layers[0].attention.qkv.bias.add_(ints(*range(120)) % 7)),
    ("smollm3", lambda m: setattr(m.body.layers[0].attention, "layer", 1)),  # which has no rope
    ("gemma3_text", lambda m: setattr(m.body.layers[0].attention, "window", None)),
]


@pytest.mark.parametrize(("family", "change"), CHANGES, ids=[f"{i}-{f}" for i, (f, _) in enumerate(CHANGES)])
def test_what_changes_is_seen(family: str, change: Callable[[Any], Any]) -> None:
    model = model_of(family)
    cache = begun(model, [12, 9])
    before = go_on(model, cache)
    change(model)
    after = go_on(model, cache)
    assert float((after - before).abs().max()) > 1e-3
    if family == "smollm3":  # the cache's layer has changed too, in the modules alone
        assert_close(run(model, FEW), model, lambda m, how: run(m, FEW, how))
        return
    torch.testing.assert_close(after, go_on(model, cache, "reference"), atol=1e-4, rtol=1e-4)


def test_norms_that_are_not_the_configurations_are_left_to_the_modules() -> None:
    for family, owner, name in (
        ("olmo2", "", "attention_out_norm"),
        ("gemma2", "", "mlp_out_norm"),
        ("olmo2", "attention", "k_norm"),
    ):
        model = model_of(family)
        block = model.body.layers[1]
        setattr(getattr(block, owner) if owner else block, name, None)
        ops.explain(reset=True)
        with torch.no_grad():
            model.run_packed(*batch(FEW))
        (decision,) = (d for d in ops.explain().decisions if d.op == "blocks")
        assert decision.chosen.backend == "torch"
        assert "norm" in decision.refused["native"]


@pytest.mark.parametrize("number", [0, 1])
def test_only_the_first_layer_is_bare(number: int) -> None:
    """With a norm there, or without one elsewhere, the modules run."""
    model = model_of("modernbert")
    block, other = model.body.layers[number], model.body.layers[1 - number]
    block.attention_norm = copy.deepcopy(other.attention_norm)
    ops.explain(reset=True)
    with torch.no_grad():
        model.run_packed(*batch(FEW))
    (decision,) = (d for d in ops.explain().decisions if d.op == "blocks")
    assert decision.chosen.backend == "torch"
    assert "attention_norm was replaced" in decision.refused["native"]


def test_a_norms_bias_that_is_no_parameter_is_left_to_the_modules() -> None:
    model = model_of("modernbert")
    model.body.layers[1].mlp_norm.bias = torch.full((40,), 3.0)
    with torch.no_grad(), pytest.raises(ops.BackendError, match="a norm's bias is not a parameter"):
        run(model, FEW)


def raw(family: str) -> dict[str, Any]:
    """Arguments of a step of three sequences of 5, 9 and 40 tokens."""
    model = model_of(family)
    cache = begun(model, [4, 8, 39])
    with torch.no_grad():
        found = decode_step.look(model)
    assert not isinstance(found, str)
    (arena, layout), ends = found
    assert ends.head is not None
    step = cache.extend(cache.rows, [1, 1, 1])
    spec = model.spec
    assert spec.rope is not None
    local = (None, None) if spec.local_rope is None else angle_table(spec.local_rope, spec.rotated, 40)
    cos, sin = angle_table(spec.rope, spec.rotated, 40)
    k_cache, v_cache = (torch.where(store.abs() < 100, store, 0.5) for store in cache.stores())
    return {
        "tokens": torch.tensor([4, 40, 7]),
        **dict(zip(("table", "scale", "minimum"), ends.table, strict=True)),
        "position_table": None,
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
        "k_scales": None,
        "v_scales": None,
        "local_cos": local[0],
        "local_sin": local[1],
        "factor": 2.0,
        "head_bias": torch.ones(41),
        "head_soft_cap": 0.0,
    }


def call(arguments: dict[str, Any]) -> Tensor:
    logits: Tensor = torch.ops.minilm.decode_steps(*arguments.values())[0]
    return logits


@pytest.mark.parametrize("family", ["phi", "gemma3_text"])
def test_the_op_refuses_arguments_that_do_not_fit(family: str) -> None:
    arguments = raw(family)
    call(arguments)
    half = arguments["cos"].shape[1]
    for changed, message in (
        ({"cos": torch.ones(40, half + 1)}, "cos and sin must be float32"),
        ({"local_cos": torch.ones(40, half), "local_sin": None}, "come together"),
        ({"local_cos": torch.ones(40, half), "local_sin": torch.ones(40, half).half()}, "must be float32"),
        (dict.fromkeys(("local_cos", "local_sin"), torch.ones(39, half)), "beyond the table of angles"),
        ({"head_bias": torch.ones(40)}, "the bias of the head must be float32"),
        ({"head_bias": torch.ones(41).half()}, "the bias of the head must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(arguments | changed)


@pytest.mark.parametrize("family", ["phi", "gemma3_text"])
def test_nothing_behind_a_tensor_is_read_or_written(family: str) -> None:
    arguments = raw(family)
    logits = call(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            with guarded(value.nbytes) as memory:
                assert torch.equal(call(arguments | {name: at_the_end(memory, value)}), logits), name


@pytest.mark.slow
def test_opcheck() -> None:
    for family in ("phi", "gemma3_text"):
        torch.library.opcheck(torch.ops.minilm.decode_steps.default, tuple(raw(family).values()))


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_other_instruction_sets(isa: str) -> None:
    """This file again, in a process that is told to use another instruction set than the best."""
    passes_with(isa, __file__, chosen="modules or parts or close or several")
