"""The native embeddings: the modules' results, whatever the tables; what is left to the modules, and why;
what the raw op refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from close import assert_as_good_as_eager
from native_runs import OTHER_ISAS, at_the_end, guarded, passes_with, require_extension, with_threads
from pairs import randomise
from strategies import ENCODERS, small
from torch import Tensor, nn

import minilm
from minilm import ops
from minilm.model.auto import MODELS
from minilm.model.layers import Embeddings, Norm
from minilm.ops.backends import packed
from minilm.ops.quantized import QuantizedWeight, dequantise, quantise
from minilm.quantized import QuantizedEmbedding

FAMILIES = ["bert", "roberta", "distilbert", "gpt2", "llama", "qwen3"]
ROWS = [0, 1, 3, 17, 1500]


@pytest.fixture(autouse=True)
def _extension_is_there() -> None:
    require_extension()


def embeddings_of(family: str, **options: Any) -> Embeddings:
    head: Any = "masked-lm" if family in ENCODERS else "causal-lm"
    model = MODELS[head].from_config(minilm.PretrainedConfig.from_dict(small(family, **options)))
    randomise(model, 0)
    embeddings: Embeddings = model.eval().requires_grad_(False).body.embeddings
    return embeddings


def inputs(embeddings: Embeddings, rows: int, types: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, positions and types, int64 [T]."""
    config, generator = embeddings.config, torch.Generator().manual_seed(rows)
    places = config.max_positions + config.position_offset

    def drawn(high: int) -> Tensor:
        return torch.randint(0, high, (rows,), generator=generator)

    kinds = drawn(config.type_vocab_size) if types and config.type_vocab_size else None
    return drawn(config.vocab_size), drawn(places), kinds


def run(embeddings: Embeddings, given: tuple[Any, ...], backend: str = "native") -> Tensor:
    with torch.no_grad(), ops.backend(backend):
        x: Tensor = embeddings(*given)
    return x


def assert_close(embeddings: Embeddings, given: tuple[Any, ...]) -> None:
    actual = run(embeddings, given)
    eager = run(embeddings, given, "reference")
    exact = run(copy.deepcopy(embeddings).double(), given, "reference")
    assert actual.dtype == eager.dtype
    floor = 4 * torch.finfo(eager.dtype).eps * float(exact.abs().max()) if len(exact) else 0.0
    assert_as_good_as_eager(actual, eager, exact, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_close(family: str, dtype: torch.dtype) -> None:
    embeddings = embeddings_of(family).to(dtype)
    ops.explain(reset=True)
    for rows in ROWS:
        for types in (False, True):
            assert_close(embeddings, inputs(embeddings, rows, types))
    assert "native" in ops.explain().backends("embed")


def test_the_sum_alone_is_that_of_the_modules_bit_by_bit() -> None:
    embeddings = embeddings_of("bert")
    embeddings.norm = None
    given = inputs(embeddings, 40, True)
    assert torch.equal(run(embeddings, given), run(embeddings, given, "reference"))


def test_root_mean_square_norms() -> None:
    embeddings = embeddings_of("llama")
    embeddings.norm = Norm(embeddings.config).requires_grad_(False)
    assert embeddings.norm.rms
    assert_close(embeddings, inputs(embeddings, 20))


@pytest.mark.parametrize("format", ["int8", "q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_quantised_tables(family: str, format: str) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4} | ({"head_dim": 16} if family == "llama" else {})
    embeddings = embeddings_of(family, **sizes)
    embeddings.tokens = QuantizedEmbedding(quantise(embeddings.tokens.weight, format), torch.float32)
    embeddings.norm = None
    given = inputs(embeddings, 50, True)
    assert torch.equal(run(embeddings, given), run(embeddings, given, "reference"))


@pytest.mark.parametrize("format", ["int8", "q8_0", "q4_0", "q4_1"])
@pytest.mark.parametrize("rows", [1, 37, 64, 77])
def test_a_packed_table_gives_the_rows_of_its_planes(format: str, rows: int) -> None:
    columns = 96 if format != "int8" else 93
    weight = quantise(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)), format)
    made = packed.pack(weight, None)
    tokens = torch.cat((torch.arange(rows).flip(0), torch.tensor([rows // 2] * 2)))
    nothing = (None,) * 6
    with guarded(made.data.numel()) as data:
        data.copy_(made.data)
        found = torch.ops.minilm.embed.default(
            tokens, data, None, None, *nothing, 0.0, False, 1.0, made.format, rows, columns
        )
    assert torch.equal(found, dequantise(weight, torch.float32)[tokens])


def test_a_packed_table_that_does_not_fit_is_refused() -> None:
    made = packed.pack(quantise(torch.randn(37, 64), "q8_0"), None)
    right = [torch.tensor([36]), made.data, None, None, *(None,) * 6, 0.0, False, 1.0, 4, 37, 64]
    torch.ops.minilm.embed.default(*right)
    for place, value, message in (
        (0, torch.tensor([37]), "beyond its table"),
        (0, torch.tensor([-1]), "beyond its table"),
        (1, made.data[:-1], "was not made for"),
        (1, made.data.view(torch.int8), "was not made for"),
        (2, torch.ones(37, 2, dtype=torch.float16), "has its scales in it"),
        (13, 5, "was not made for"),
        (13, 2, "must be quantised"),
        (13, 6, "must be quantised"),
        (14, 0, "impossible size"),
        (14, 1 << 40, "impossible size"),
        (15, 63, "multiple of 32"),
        (15, 96, "was not made for"),
        (15, 0, "no channels"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.minilm.embed.default(*right[:place], value, *right[place + 1 :])


@pytest.mark.parametrize("rows", [5, 1500])
def test_a_row_does_not_depend_on_the_others_or_on_threads(rows: int) -> None:
    embeddings = embeddings_of("bert")
    tokens, positions, types = inputs(embeddings, rows, True)
    whole = run(embeddings, (tokens, positions, types))
    for other in with_threads(lambda: run(embeddings, (tokens, positions, types))):
        assert torch.equal(other, whole)
    assert types is not None
    for i in (0, rows // 2, rows - 1):
        alone = run(embeddings, (tokens[i : i + 1], positions[i : i + 1], types[i : i + 1]))
        assert torch.equal(alone[0], whole[i])


def test_what_is_left_to_the_modules() -> None:
    embeddings = embeddings_of("bert")
    given = inputs(embeddings, 4)

    def why(given: tuple[Any, ...] = given) -> str:
        ops.explain(reset=True)
        embeddings(*given)
        (decision,) = [d for d in ops.explain().decisions if d.op == "embed"]
        return decision.refused.get("native", "it ran")

    with torch.no_grad():
        ops.explain(reset=True)
        embeddings(torch.randn(4, embeddings.config.hidden_size), *given[1:])
        assert not ops.explain().backends("embed"), "what is embedded already is not looked up"
        embeddings.train()
        embeddings.config = embeddings.config.__class__(
            **{**vars(embeddings.config), "embedding_dropout": 0.5}
        )
        assert "dropout is on" in why()
        embeddings.eval()
        assert why() == "it ran"
        handle = embeddings.tokens.register_forward_hook(lambda *a: None)
        assert "forward hooks" in why()
        handle.remove()
        kept, embeddings.norm = embeddings.norm, nn.Identity()  # type: ignore[assignment]
        embeddings.norm.norm = lambda x: x  # type: ignore[union-attr, assignment]
        assert "replaced by a Identity" in why()
        embeddings.norm = kept
    embeddings.requires_grad_(True)
    assert "gradients are enabled" in why()


def raw(**changes: Any) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def table(rows: int) -> Tensor:
        return torch.randn(rows, 40, generator=generator)

    arguments = {
        "tokens": torch.tensor([3, 0, 6]), "table": table(7), "scale": None, "minimum": None,
        "types": torch.tensor([1, 0, 1]), "type_table": table(2), "positions": torch.tensor([0, 4, 2]),
        "position_table": table(5), "norm_weight": torch.ones(40), "norm_bias": torch.ones(40),
        "eps": 1e-5, "rms": False,
    }  # fmt: skip
    return tuple((arguments | changes).values())


CODES = quantise(torch.randn(7, 64, generator=torch.Generator().manual_seed(0)), "q4_1")


def quantised(weight: QuantizedWeight, **changes: Any) -> dict[str, Any]:
    planes = {"table": weight.codes, "scale": weight.scale, "minimum": weight.minimum}
    rest = dict.fromkeys(("type_table", "position_table", "norm_weight", "norm_bias"))
    return planes | rest | changes


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tokens": torch.tensor([3, 6])}, "types must be int64"),
    ({"tokens": torch.tensor([3, 7, 0])}, "beyond its table"),
    ({"tokens": torch.tensor([3, -1, 0])}, "beyond its table"),
    ({"tokens": torch.tensor([3, 1, 0], dtype=torch.int32)}, "tokens must be int64"),
    ({"tokens": torch.tensor([[3, 1, 0]])}, "tokens must be int64"),
    ({"table": torch.ones(7)}, "must be"),
    ({"table": torch.ones(7, 0)}, "no channels"),
    ({"table": torch.ones(7, 40).double()}, "of floats or of codes"),
    ({"table": torch.ones(40, 7).T}, "contiguous"),
    ({"table": torch.ones(7, 41)}, "another length"),
    ({"scale": torch.ones(7)}, "has scales if it holds codes"),
    ({"minimum": torch.ones(7)}, "only a table of 4-bit codes"),
    ({"types": torch.tensor([2, 0, 0])}, "beyond its table"),
    ({"types": torch.tensor([1, 0])}, "types must be"),
    ({"type_table": torch.ones(0, 40), "types": None}, "a table is empty"),
    ({"positions": None}, "needs positions"),
    ({"positions": torch.tensor([5, 0, 0])}, "beyond its table"),
    ({"norm_weight": torch.ones(39)}, "must be float32"),
    ({"norm_bias": torch.ones(40).half()}, "must be float32"),
    (quantised(CODES, scale=None), "has scales"),
    (quantised(CODES, scale=CODES.scale.float()), "scales must be"),
    (quantised(CODES, scale=CODES.scale[:5]), "for every row"),
    (quantised(CODES, scale=torch.ones(7)), "for each group"),
    (quantised(CODES, minimum=CODES.scale[:5]), "minimums must be"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{i}-{m}" for i, (_, m) in enumerate(BAD)])
def test_bad_arguments_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.minilm.embed(*raw(**changes))


def test_nothing_behind_the_tables_is_read() -> None:
    for changes in ({}, quantised(CODES)):
        given = raw(**changes)
        expected = torch.ops.minilm.embed(*given)
        for place, tensor in enumerate(given):
            if isinstance(tensor, Tensor):
                with guarded(tensor.nbytes) as memory:
                    moved = (*given[:place], at_the_end(memory, tensor), *given[place + 1 :])
                    assert torch.equal(torch.ops.minilm.embed(*moved), expected)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.minilm.embed.default, raw())
    torch.library.opcheck(torch.ops.minilm.embed.default, raw(**quantised(CODES)))
    made = packed.pack(quantise(torch.randn(37, 64), "q8_0"), None)
    given = (torch.tensor([36]), made.data, *(None,) * 8, 0.0, False, 1.0, 4, 37, 64)
    torch.library.opcheck(torch.ops.minilm.embed.default, given)


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set(isa: str) -> None:
    """This file again, in a process that is told to use another instruction set than the best."""
    passes_with(isa, __file__, chosen="close or depend or norms")
