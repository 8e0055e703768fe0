"""All blocks of a Transformer in one native call: the same results as the modules', whatever the family, the
batch, the threads; what it leaves to the modules, and why; what changes are seen; what the raw op refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from close import assert_as_good_as_eager
from fused_models import (
    DECODERS,
    QUANTISED_ERROR,
    SIZES,
    WIDE,
    batch,
    ints,
    model_of,
    quantise_blocks,
)
from hypothesis import given
from hypothesis import strategies as st
from native_runs import (
    OTHER_ISAS,
    at_the_end,
    examples,
    guarded,
    passes_with,
    require_extension,
    with_threads,
)
from torch import Tensor, nn

import minilm
from minilm import ops
from minilm.model.batch import pack
from minilm.native import blocks as fused
from minilm.native.arena import Arena

FEW = [5, 1, 0, 3]
MANY = [33, 1, 250, 0, 16, 101]
SHORT = [7 * i % 41 for i in range(66)]
"""Lengths of the sequences of three batches: fewer rows than a block has; more for each of four threads; so
many that one or two threads share them out whole, and three or four do not."""


@pytest.fixture(autouse=True)
def _extension_is_there() -> None:
    require_extension()


def run(model: Any, lengths: list[int], backend: str = "native", **options: Any) -> Tensor:
    """Hidden states of the whole batch, [T, C]."""
    with torch.no_grad(), ops.backend(backend):
        hidden: Tensor = model.run_packed(*batch(lengths), **options)
    return hidden


def assert_close(model: Any, actual: Tensor, lengths: list[int]) -> None:
    """At most twice as far from float64 as the modules on the reference are."""
    eager = run(model, lengths, "reference")
    exact = run(copy.deepcopy(model).double(), lengths, "reference")
    floor = 4 * torch.finfo(eager.dtype).eps * float(exact.abs().max())
    assert_as_good_as_eager(actual, eager, exact, floor=floor)


@pytest.mark.parametrize("lengths", [FEW, MANY, SHORT], ids=["few", "many", "short"])
@pytest.mark.parametrize("family", SIZES)
def test_the_body_is_close(family: str, lengths: list[int]) -> None:
    model = model_of(family)
    ops.explain(reset=True)
    actual = run(model, lengths)
    assert {d.op for d in ops.explain().decisions} <= {"blocks", "embed"}
    assert_close(model, actual, lengths)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu", "relu", "quick_gelu", "tanh", "linear"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_activation_is_close(family: str, activation: str) -> None:
    model = model_of(family, hidden_act=activation, num_hidden_layers=1)
    for lengths in (FEW, MANY):
        assert_close(model, run(model, lengths), lengths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen3"])
def test_16_bit_models_are_close(family: str, dtype: torch.dtype) -> None:
    model = model_of(family).to(dtype)
    for lengths in (FEW, MANY):
        actual = run(model, lengths)
        assert actual.dtype == dtype
        assert_close(model, actual, lengths)


def in_parts(model: Any, lengths: list[int], parts: list[list[int]], backend: str = "native") -> Tensor:
    """The batch through a cache, ``parts[i][b]`` tokens of sequence b in the i-th step; [T, C] as `run`'s."""
    tokens, _ = batch(lengths)
    sequences = list(torch.split(tokens, lengths))
    cache = model.new_cache(len(lengths))
    found: list[list[Tensor]] = [[] for _ in lengths]
    begun = [0] * len(lengths)
    for counts in parts:
        rows = [row for row, count in enumerate(counts) if count]
        ids = [sequences[row][begun[row] : begun[row] + counts[row]] for row in rows]
        some = [counts[row] for row in rows]
        columns = torch.arange(max(some))
        step = pack(len(rows), max(some), columns < torch.tensor(some)[:, None], torch.device("cpu"))
        first = torch.tensor([begun[row] for row in rows])
        step.positions = step.positions + first.repeat_interleave(torch.tensor(some))
        with torch.no_grad(), ops.backend(backend):
            hidden = model.run_packed(torch.cat(ids), step, cache=cache, rows=rows)
        for row, part in zip(rows, torch.split(hidden, some), strict=True):
            found[row].append(part)
            begun[row] += counts[row]
    assert begun == lengths
    return torch.cat([part for parts in found for part in parts])


def shared_out(lengths: list[int], first: list[int], others: int) -> list[list[int]]:
    """A prompt of `first` tokens a sequence, then at most `others` a step."""
    parts, left = [first], [n - f for n, f in zip(lengths, first, strict=True)]
    while any(left):
        parts.append([min(n, others) for n in left])
        left = [n - min(n, others) for n in left]
    return parts


@pytest.mark.parametrize("family", DECODERS)
def test_a_prompt_and_steps_of_decoding_are_the_whole_forward_pass(family: str) -> None:
    """With sequences of several lengths, of which some end before others."""
    model = model_of(family)
    lengths = [40, 7, 33]
    prompt = [31, 5, 32]
    actual = in_parts(model, lengths, shared_out(lengths, prompt, 1))
    assert_close(model, actual, lengths)
    at_once = in_parts(model, lengths, [lengths])
    assert torch.equal(at_once, run(model, lengths)), "a fresh cache changes the result"


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_a_prompt_in_parts_is_the_whole_prompt(family: str) -> None:
    model = model_of(family)
    lengths = [150, 60, 11]
    actual = in_parts(model, lengths, shared_out(lengths, [64, 2, 11], 50))
    assert_close(model, actual, lengths)


def test_a_context_of_several_stretches_is_close() -> None:
    model = model_of("llama", num_hidden_layers=1, max_position_embeddings=700)
    lengths = [640, 512, 300]  # the middle one is cut into more stretches than the longest
    actual = in_parts(model, lengths, shared_out(lengths, [630, 502, 295], 1))
    assert_close(model, actual, lengths)


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_a_step_of_a_large_batch_is_close(family: str) -> None:
    """More rows than 48 a thread are cut into blocks, and each of them is a sequence."""
    model = model_of(family)
    lengths = [2 + 7 * i % 40 for i in range(120)]
    parts = shared_out(lengths, [n - 1 for n in lengths], 1)
    first, *others = with_threads(lambda: in_parts(model, lengths, parts), (1, 2, 4))
    assert all(torch.equal(first, other) for other in others)
    assert_close(model, first, lengths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_cache_is_as_good_as_the_modules(dtype: torch.dtype) -> None:
    model = model_of("llama").to(dtype)
    lengths = [40, 7, 33]
    parts = shared_out(lengths, [31, 5, 32], 1)
    exact = run(copy.deepcopy(model).double(), lengths, "reference")
    assert_as_good_as_eager(
        in_parts(model, lengths, parts), in_parts(model, lengths, parts, "reference"), exact
    )


@pytest.mark.parametrize("lengths", [MANY, SHORT], ids=["many", "short"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in ("bert", "gpt2", "llama", "mistral", "qwen3")]
    + [(family, torch.bfloat16) for family in ("bert", "llama")],
    ids=str,
)
def test_a_sequence_does_not_depend_on_its_batch(family: str, dtype: torch.dtype, lengths: list[int]) -> None:
    """Bit by bit, alone (few rows) as in a large batch (many)."""
    model = model_of(family).to(dtype)
    whole = run(model, lengths)
    tokens, _ = batch(lengths)
    parts = zip(torch.split(tokens, lengths), torch.split(whole, lengths), lengths, strict=True)
    for ids, expected, length in parts:
        if length:
            with torch.no_grad(), ops.backend("native"):
                alone = model.run_packed(ids, batch([length])[1])
            assert torch.equal(alone, expected), f"a sequence of {length}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("lengths", [[2], [5, 40, 15], MANY, SHORT], ids=["few", "between", "many", "short"])
def test_the_body_does_not_depend_on_threads(family: str, lengths: list[int], dtype: torch.dtype) -> None:
    """60 rows are many for one thread and few for four."""
    model = model_of(family).to(dtype)
    first, *others = with_threads(lambda: run(model, lengths))
    assert all(torch.equal(first, other) for other in others)


def test_a_step_of_decoding_does_not_depend_on_batch_or_threads() -> None:
    model = model_of("llama")
    lengths, prompt = [40, 7, 300], [39, 6, 299]
    parts = shared_out(lengths, prompt, 1)
    first, *others = with_threads(lambda: in_parts(model, lengths, parts))
    assert all(torch.equal(first, other) for other in others)
    at = 0
    tokens, _ = batch(lengths)
    for length, begun in zip(lengths, prompt, strict=True):
        ids = tokens[at : at + length]
        cache = model.new_cache(1)
        for some, position in ((ids[:begun], 0), (ids[begun:], begun)):
            step = batch([len(some)])[1]
            step.positions = step.positions + position
            with torch.no_grad(), ops.backend("native"):
                hidden = model.run_packed(some, step, cache=cache, rows=cache.rows)
        assert torch.equal(hidden[0], first[at + begun])
        at += length


def test_nan_stays_in_its_sequence() -> None:
    model = model_of("llama")
    x = torch.randn(sum(MANY), 40, generator=torch.Generator().manual_seed(0))
    found = batch(MANY)[1]
    with torch.no_grad(), ops.backend("native"):
        clean = model.run_packed(x, found)
        x[40, 3] = torch.nan  # of the third sequence, the tokens 34..283
        hidden = model.run_packed(x, found)
    assert hidden[40:284].isnan().all()
    hidden[34:284] = clean[34:284]
    assert torch.equal(hidden, clean)


# What is left to the modules


def refusal(model: Any, call: Any = None) -> str:
    """Why the native blocks did not run."""
    ops.explain(reset=True)
    (call or (lambda: model(batch([6])[0].view(1, -1))))()
    (decision,) = (d for d in ops.explain().decisions if d.op == "blocks")
    assert decision.chosen.backend == "torch"
    return decision.refused["native"]


def ids() -> Tensor:
    return batch([6])[0].view(1, -1)


class Doubled(nn.Linear):
    """A layer of somebody's own."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        return ops.linear(x, self.weight * 2, self.bias, activation)


def test_what_is_asked_for_besides_is_left_to_the_modules() -> None:
    model = model_of("llama")
    assert "outputs of each layer" in refusal(model, lambda: model(ids(), output_hidden_states=True))
    assert "outputs of each layer" in refusal(model, lambda: model(ids(), output_attentions=True))
    model.requires_grad_(True)
    assert "gradients are enabled" in refusal(model)
    with torch.no_grad():
        run(model, FEW)
    assert "no kernel for torch.float64" in refusal(model_of("llama").double())
    assert "activation mish" in refusal(model_of("llama", hidden_act="mish"))
    assert "there are no layers" in refusal(model_of("llama", num_hidden_layers=0))
    wide = model_of("gpt2")
    wide.new_cache = lambda rows=0: minilm.cache.KVCache(
        wide.spec, rows=rows, dtype=torch.float64, device="cpu"
    )
    assert "a cache in torch.float64" in refusal(wide, lambda: wide.float()(ids(), use_cache=True))


def test_gradients_with_respect_to_what_goes_in_are_left_to_the_modules() -> None:
    model = model_of("bert")
    x = torch.randn(1, 6, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert "gradients are enabled" in refusal(model, lambda: model(inputs_embeds=x).logits.sum().backward())
    assert x.grad is not None
    assert bool(x.grad.any())


def test_dropout_is_left_to_the_modules() -> None:
    model = model_of("bert").train()
    assert "dropout is on" in refusal(model)
    none = model_of("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    run(none, FEW)


def test_hooks_and_exchanged_modules_are_left_to_the_modules() -> None:
    model = model_of("llama")
    native = run(model, FEW)
    seen = []
    handle = model.body.layers[1].mlp.register_forward_hook(lambda *a: seen.append(1))
    assert "forward hooks" in refusal(model)
    assert seen
    handle.remove()
    assert torch.equal(run(model, FEW), native)
    handle = model.body.layers[0].register_forward_pre_hook(lambda *a: None)
    assert "forward hooks" in refusal(model)
    handle.remove()

    block = model.body.layers[1]
    old = block.mlp.down
    block.mlp.down = Doubled(77, 40, bias=False)
    block.mlp.down.weight = old.weight
    assert "linear layer was replaced by a Doubled" in refusal(model)
    assert not torch.equal(run(model, FEW, "reference"), native)
    block.mlp.down = old
    assert torch.equal(run(model, FEW), native)
    block.attention_norm = nn.Identity()
    with torch.no_grad():
        assert fused.look(model.body) == "a layer's attention_norm was replaced by a Identity"
    del model.body.layers[1]
    assert "there are 1 layers, and the configuration has 2" in refusal(model)


def test_a_compiled_model_is_traced() -> None:
    model = model_of("bert")
    eager = model(ids()).logits
    compiled = torch.compile(model, backend="aot_eager")
    ops.explain(reset=True)
    torch.testing.assert_close(compiled(ids()).logits, eager, atol=1e-5, rtol=1e-5)
    assert "native" not in ops.explain().backends("blocks")


# What changes


def write(model: Any) -> None:
    model.body.layers[1].attention.qkv.weight[3] += 1


def write_bias(model: Any) -> None:
    model.body.layers[0].mlp.up.bias += 1


def write_norm(model: Any) -> None:
    model.body.layers[0].mlp_norm.weight *= 2


def step(model: Any) -> None:
    parameters = list(model.body.layers.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()


def load(model: Any) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def exchange_parameter(model: Any) -> None:
    model.body.layers[1].mlp.down.weight = nn.Parameter(torch.ones(40, 77))


def exchange_data(model: Any) -> None:
    model.body.layers[1].mlp.down.weight.data = torch.ones(40, 77)


def exchange_module(model: Any) -> None:
    model.body.layers[0].mlp.up = copy.deepcopy(model.body.layers[1].mlp.up)


def exchange_layer(model: Any) -> None:
    model.body.layers[0] = copy.deepcopy(model.body.layers[1])


def other_dtype(model: Any) -> None:
    model.body.layers[0].mlp.to(torch.bfloat16)
    model.body.layers[0].mlp.float()


@pytest.mark.parametrize(
    "change",
    [
        write,
        write_bias,
        write_norm,
        step,
        load,
        exchange_parameter,
        exchange_data,
        exchange_module,
        exchange_layer,
        other_dtype,
    ],
    ids=lambda f: f.__name__,
)
def test_what_changes_is_packed_anew(change: Any) -> None:
    model = model_of("bert")
    before = run(model, FEW)
    assert torch.equal(run(model, FEW), before)
    with torch.no_grad():
        arena = fused.look(model.body)
        change(model)
    after = run(model, FEW)
    with torch.no_grad():
        assert fused.look(model.body) is not arena
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, run(model, FEW, "reference"), atol=1e-4, rtol=1e-4)


def test_nothing_is_packed_twice() -> None:
    model = model_of("bert")
    run(model, FEW)
    with torch.no_grad():
        arena = fused.look(model.body)
    model.body.embeddings.tokens.weight.mul_(2)
    run(model, MANY)
    with torch.no_grad():
        assert fused.look(model.body) is arena
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.body.layers[0].mlp.up.weight.zero_()
    assert not torch.equal(run(twin, FEW), run(model, FEW))


# Quantised layers


@pytest.mark.parametrize("lengths", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("format", QUANTISED_ERROR)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_quantised_layers_are_close(family: str, format: str, lengths: list[int]) -> None:
    model = model_of(family, **{k: v for k, v in WIDE.items() if family == "llama" or k != "head_dim"})
    quantise_blocks(model, format)
    expected = run(model, lengths, "reference")
    actual = run(model, lengths)
    error = (actual - expected).norm() / expected.norm()
    assert error < QUANTISED_ERROR[format]
    assert error > 0, "x was not quantised"
    for other in with_threads(lambda: run(model, lengths), (1, 4)):
        assert torch.equal(other, actual)


# What the raw op refuses


def raw(family: str = "llama", layers: int = 1) -> dict[str, Any]:
    """Arguments of one call with a cache."""
    model = model_of(family, num_hidden_layers=layers)
    found = fused.look(model.body)
    assert isinstance(found, Arena)
    pages = [torch.zeros(layers, 3, 4, 2, 20) for _ in range(2)]
    return {
        "embedded": torch.randn(5, 40, generator=torch.Generator().manual_seed(0)),
        "arena": found.weights,
        "layout": found.layout,
        "cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32),
        "cos": torch.ones(5, 10),
        "sin": torch.zeros(5, 10),
        "k_cache": pages[0],
        "v_cache": pages[1],
        "slots": torch.tensor([0, 1, 2, 4, 5]),
        "block_table": torch.tensor([[0], [1]], dtype=torch.int32),
        "context_lens": torch.tensor([3, 2], dtype=torch.int32),
        "fresh": True,
    }


def call(arguments: dict[str, Any]) -> Tensor:
    result: Tensor = torch.ops.minilm.transformer(*arguments.values())
    return result


BAD: list[tuple[dict[str, Any], str]] = [
    ({"embedded": torch.ones(5, 41)}, "x must be float32"),
    ({"embedded": torch.ones(5, 40).double()}, "x must be float32"),
    ({"embedded": torch.ones(40, 5).T}, "x must be float32"),
    ({"embedded": torch.ones(5, 2, 20)}, "x must be float32"),
    ({"embedded": torch.ones(4, 40)}, "cu_seqlens must grow"),
    ({"arena": torch.ones(100)}, "the arena must be uint8"),
    ({"arena": torch.ones(0, dtype=torch.uint8)}, "outside of the arena"),
    ({"layout": ints(1, 2, 3)}, "the layout int64"),
    ({"layout": torch.ones(0, dtype=torch.int64)}, "too short"),
    ({"cu_seqlens": ints(0, 3, 6)}, "cu_seqlens must grow"),
    ({"cu_seqlens": ints(0, 6, 5)}, "cu_seqlens must grow"),
    ({"cu_seqlens": ints(1, 3, 5)}, "cu_seqlens must grow"),
    ({"cu_seqlens": ints(0, -3, 5)}, "cu_seqlens must grow"),
    ({"cu_seqlens": ints(0, 3, 5, dtype=torch.int64)}, "cu_seqlens must be"),
    ({"cu_seqlens": ints()}, "cu_seqlens must be"),
    ({"cos": None}, "cos and sin come together"),
    ({"sin": None}, "cos and sin come together"),
    ({"cos": torch.ones(4, 10)}, "cos and sin must be"),
    ({"sin": torch.ones(5, 20)}, "cos and sin must be"),
    ({"sin": torch.ones(5, 10).half()}, "cos and sin must be"),
    ({"v_cache": None}, "come together"),
    ({"slots": None}, "come together"),
    ({"block_table": None}, "come together"),
    ({"context_lens": None}, "come together"),
    ({"k_cache": torch.zeros(1, 3, 4, 2, 20).double()}, "the cache must be float32"),
    ({"k_cache": torch.zeros(1, 3, 4, 2, 20, dtype=torch.int16)}, "the cache must be float32"),
    (
        {name: torch.zeros(1, 3, 4, 2, 20, dtype=torch.int8) for name in ("k_cache", "v_cache")},
        "comes with scales",
    ),
    ({"k_cache": torch.zeros(1, 3, 4, 2, 20).half()}, "keys and values alike"),
    ({"v_cache": torch.zeros(1, 2, 4, 2, 20)}, "keys and values alike"),
    ({"v_cache": torch.zeros(1, 3, 3, 2, 20)}, "keys and values alike"),
    ({"v_cache": torch.zeros(1, 3, 2, 4, 20)}, "keys and values alike"),
    ({"k_cache": torch.zeros(2, 3, 4, 2, 20)}, "keys and values alike"),
    ({"k_cache": torch.zeros(1, 3, 4, 2, 19)}, "keys and values alike"),
    ({"k_cache": torch.zeros(1, 3, 4, 40)}, "keys and values alike"),
    ({"k_cache": torch.zeros(1, 3, 4, 20, 2).mT}, "keys and values alike"),
    ({"slots": ints(0, 1, 2, 4, 12, dtype=torch.int64)}, "a slot lies outside"),
    ({"slots": ints(0, 1, 2, 4, -1, dtype=torch.int64)}, "a slot lies outside"),
    ({"slots": ints(0, 1, 2, 4, dtype=torch.int64)}, "slots must be"),
    ({"slots": ints(0, 1, 2, 4, 5)}, "slots must be"),
    ({"block_table": ints(0, 1)}, "block_table must be"),
    ({"block_table": ints(0, 1).view(1, 2)}, "block_table must be"),
    ({"block_table": ints(0, 3).view(2, 1)}, "names a page"),
    ({"block_table": ints(0, -1).view(2, 1)}, "names a page"),
    ({"block_table": ints(0, 1).view(2, 1).long()}, "block_table must be"),
    ({"context_lens": ints(3, 5)}, "longer than its pages"),
    ({"context_lens": ints(2, 2)}, "shorter than its new tokens"),
    ({"context_lens": ints(3, -1)}, "shorter than its new tokens"),
    ({"context_lens": ints(2**31 - 1, 2)}, "longer than its pages"),
    ({"context_lens": ints(3)}, "context_lens must be"),
    ({"context_lens": ints(3, 2, dtype=torch.int64)}, "context_lens must be"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
@pytest.mark.parametrize("fresh", [True, False])
def test_the_op_refuses_tensors_that_do_not_fit(changed: dict[str, Any], message: str, fresh: bool) -> None:
    arguments = raw() | {"fresh": fresh}
    call(arguments)
    cache = arguments["k_cache"].clone()
    with pytest.raises(RuntimeError, match=message):
        call(arguments | changed)
    assert torch.equal(cache, arguments["k_cache"])


@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "gpt2"])
def test_no_number_of_the_layout_leads_out_of_the_arena(family: str) -> None:
    """Each number is changed. What is accepted runs, with an arena behind which nothing may be read."""
    arguments = raw(family) if family == "llama" else without_cache(family)
    layout = arguments["layout"]
    refused = 0
    with guarded(arguments["arena"].numel()) as memory:
        arguments["arena"] = at_the_end(memory, arguments["arena"])
        for place in range(len(layout)):
            old = int(layout[place])
            for new in {
                old + 1,
                old - 1,
                old + 64,
                old - 64,
                2 * old,
                -1,
                0,
                7,
                2**28,
                2**31,
                2**62,
                -(2**63),
            }:
                changed = layout.clone()
                changed[place] = new
                try:
                    y = call(arguments | {"layout": changed})
                except RuntimeError as error:
                    assert "transformer: " in str(error)  # noqa: PT017
                    refused += 1
                else:
                    assert y.shape == arguments["embedded"].shape
        for cut in (layout[:-1], torch.cat((layout, layout[-1:]))):
            with pytest.raises(RuntimeError, match="the layout is too"):
                call(arguments | {"layout": cut})
    assert refused > 5 * len(layout)


def without_cache(family: str) -> dict[str, Any]:
    model = model_of(family, **({"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}))
    found = fused.look(model.body)
    assert isinstance(found, Arena)
    rope = (torch.ones(5, 5), torch.zeros(5, 5)) if family == "qwen3" else (None, None)
    return {
        "embedded": torch.randn(5, 40, generator=torch.Generator().manual_seed(0)),
        "arena": found.weights,
        "layout": found.layout,
        "cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32),
        **dict(zip(("cos", "sin"), rope, strict=True)),
        **dict.fromkeys(("k_cache", "v_cache", "slots", "block_table", "context_lens")),
        "fresh": True,
    }


@examples(300)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 59),
            st.sampled_from([-1, 0, 1, 2, 5, 64, 128, 2**10, 2**28, 2**40, 2**63 - 1])
            | st.integers(0, 2**16),
        ),
        min_size=2,
        max_size=4,
    )
)
def test_no_numbers_of_the_layout_together_lead_out_of_the_arena(changes: list[tuple[int, int]]) -> None:
    global _hostile
    _hostile = _hostile or raw()
    layout = _hostile["layout"].clone()
    for place, value in changes:
        layout[place % len(layout)] = value
    arena = _hostile["arena"]
    with guarded(arena.numel()) as memory:
        try:
            call(_hostile | {"layout": layout, "arena": at_the_end(memory, arena)})
        except RuntimeError as error:
            assert "transformer: " in str(error)  # noqa: PT017


_hostile: dict[str, Any] = {}


def test_nothing_behind_the_arena_or_the_embeddings_is_read() -> None:
    for family in ("llama", "bert"):
        arguments = raw() if family == "llama" else without_cache(family)
        expected = call(arguments)
        for name in ("arena", "embedded"):
            with guarded(arguments[name].nbytes) as memory:
                moved = arguments | {name: at_the_end(memory, arguments[name])}
                assert torch.equal(call(moved), expected)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_opcheck(family: str) -> None:
    arguments = raw() if family == "llama" else without_cache(family)
    torch.library.opcheck(torch.ops.minilm.transformer.default, tuple(arguments.values()))


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set(isa: str) -> None:
    """This file again, in a process that is told to use another instruction set than the best."""
    passes_with(
        isa, __file__, chosen="body_is_close or 16_bit or quantised or depend or whole or stretches or behind"
    )
