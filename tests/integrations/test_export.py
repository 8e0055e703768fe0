"""torch.export, torch.jit.trace and torch.onnx.export: exported models run without minilm, at other sizes and
with padding on either side, and compute the same."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_close
from pairs import class_of, heads_of, randomise
from strategies import FAMILIES, small
from torch import Tensor, nn

import minilm
from minilm.sentence import modules as after
from minilm.sentence.encoder import SentenceEncoder

SIZES = ((1, 2, False), (3, 9, True), (5, 11, False), (2, 7, True))
PAIRS = [(family, head) for family in FAMILIES for head in heads_of(family)]
IDS = [f"{family}-{head}" for family, head in PAIRS]
QUICK = [("bert", "sequence-classification"), ("mistral", "causal-lm")]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*padded on the left:UserWarning"),
]


def slow_but(quick: list[tuple[str, Any]]) -> list[Any]:
    """All families with all heads, of which a few are for the quick tests."""
    return [pytest.param(*pair, marks=[] if pair in quick else [pytest.mark.slow]) for pair in PAIRS]


def batch(rows: int, columns: int, left: bool) -> tuple[Tensor, Tensor]:
    """Random ids, and a mask of rows of random lengths."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    mask = (torch.arange(columns) < lengths).long()
    ids = torch.randint(3, 41, (rows, columns), generator=generator)
    return ids, mask.flip(1) if left else mask


def made(family: str, head: Any, **options: Any) -> Any:
    """A random model, in evaluation mode."""
    config = minilm.PretrainedConfig.from_dict(small(family, **options))
    model = class_of(minilm, family, head).from_config(config).eval()
    randomise(model, 0)
    return model


def open_sizes(names: tuple[str, ...] = ("input_ids", "attention_mask")) -> dict[str, Any]:
    """Batch and tokens of any size."""
    rows, columns = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("columns", min=2, max=11)
    return {name: {0: rows, 1: columns} for name in names}


def holds(run: Callable[..., Any], model: Any, names: list[str] | None = None) -> None:
    """`run` gives what the model gives; `names`: of its fields, where it gives a tuple or a list."""
    for size in SIZES:
        ids, mask = batch(*size)
        with torch.no_grad():
            found, expected = run(ids, mask), model(ids, mask, use_cache=False)
        values = found if names is None else dict(zip(names, found, strict=True))
        assert list(values) == list(expected)
        for name, value in expected.items():
            assert_close(torch.as_tensor(values[name]), value, atol=1e-4, what=f"{name} at {size}")


def fields(model: Any) -> list[str]:
    """What the model answers with."""
    with torch.no_grad():
        return list(model(*batch(2, 7, False), use_cache=False))


# torch.export


@pytest.mark.parametrize(("family", "head"), slow_but(QUICK[:1]), ids=IDS)
def test_export(family: str, head: Any) -> None:
    model = made(family, head)
    program = torch.export.export(model, batch(2, 7, False), dynamic_shapes=open_sizes())
    assert not [node for node in program.graph.nodes if "minilm" in str(node.target)]
    assert type(program.module()(*batch(2, 7, False))).__name__ == type(model(*batch(2, 7, False))).__name__
    holds(program.module(), model)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head"), [("roberta", "token-classification"), ("qwen3", "causal-lm")])
def test_strict_export_and_a_saved_program(family: str, head: Any) -> None:
    model = made(family, head)
    program = torch.export.export(model, batch(2, 7, False), dynamic_shapes=open_sizes(), strict=True)
    holds(program.module(), model)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    holds(torch.export.load(file).module(), model)


@pytest.mark.slow
def test_export_with_keywords_and_all_inputs() -> None:
    model = made("bert", "base")
    ids, mask = batch(2, 7, False)
    call = {"token_type_ids": ids % 2, "attention_mask": mask, "position_ids": ids % 9}
    shapes = open_sizes(("input_ids", *call))
    program = torch.export.export(model, (ids,), call, dynamic_shapes=shapes)
    ids, mask = batch(3, 9, True)
    call = {"token_type_ids": (ids + 1) % 2, "attention_mask": mask, "position_ids": ids % 11}
    with torch.no_grad():
        found, expected = program.module()(ids, **call), model(ids, **call)
    for name in expected:
        assert_close(found[name], expected[name], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "q8_0", "q4_1"])
def test_export_of_quantised_weights(weights: str, tmp_path: Path) -> None:
    """They stay quantised, and each matrix is made when it is used."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    made("llama", "causal-lm", **sizes).save_pretrained(tmp_path)
    model = minilm.AutoModelForCausalLM.from_pretrained(tmp_path, weights=weights)
    program = torch.export.export(model, batch(2, 7, False), dynamic_shapes=open_sizes())
    ids, mask = batch(3, 9, True)
    with torch.no_grad(), minilm.backend("reference"):
        assert_close(program.module()(ids, mask).logits, model(ids, mask).logits, atol=1e-4)


@pytest.mark.slow
def test_export_in_bfloat16() -> None:
    model = made("llama", "causal-lm")
    exact = model.double()(*batch(3, 9, True), use_cache=False).logits
    model = model.to(torch.bfloat16)
    program = torch.export.export(model, batch(2, 7, False), dynamic_shapes=open_sizes())
    with torch.no_grad():
        found = program.module()(*batch(3, 9, True)).logits
        expected = model(*batch(3, 9, True), use_cache=False).logits
    error = float((expected.double() - exact).abs().max())
    assert found.dtype == torch.bfloat16
    assert_close(found.double(), exact, atol=3 * error)


# torch.jit


@pytest.mark.parametrize(("family", "head"), slow_but(QUICK), ids=IDS)
def test_trace(family: str, head: Any, recwarn: pytest.WarningsRecorder) -> None:
    """The result is a tuple, and no size is taken for a constant."""
    model = made(family, head)
    traced = torch.jit.trace(model, batch(2, 7, False))
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]
    names = fields(model)
    holds(traced, model, names)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    holds(torch.jit.load(file), model, names)


# ONNX


def onnx_run(file: Path) -> Callable[..., list[Any]]:
    """The file in onnxruntime, called with tensors."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Any]:
        arrays: list[Any] = [np.asarray(tensor) for tensor in inputs]
        return list(session.run(None, dict(zip(names, arrays, strict=True))))

    return run


ONNX = [
    ("bert", "base"),
    ("bert", "sequence-classification"),
    ("roberta", "masked-lm"),
    ("distilbert", "token-classification"),
    ("bert", "question-answering"),
    ("gpt2", "causal-lm"),
    ("llama", "causal-lm"),
    ("mistral", "sequence-classification"),
]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dynamic_shapes", "dynamic_axes", "torchscript"])
@pytest.mark.parametrize(("family", "head"), ONNX)
def test_onnx(family: str, head: Any, way: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, file = made(family, head), tmp_path / "model.onnx"
    names = fields(model)
    axes = {name: {0: "rows", 1: "columns"} for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {
        "dynamo": way != "torchscript",
        "input_names": list(axes),
        "output_names": names,
    }
    if way == "dynamic_shapes":
        options["dynamic_shapes"] = open_sizes()
    else:
        of_tokens = [n for n in names if n in ("last_hidden_state", "start_logits", "end_logits")]
        of_tokens += ["logits"] * (head in ("masked-lm", "token-classification", "causal-lm"))
        options["dynamic_axes"] = axes | dict.fromkeys(of_tokens, axes["input_ids"])
        options["dynamic_axes"] |= {name: {0: "rows"} for name in names if name not in of_tokens}
        if way == "dynamic_axes":  # of results they follow
            options["dynamic_axes"] = axes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, batch(2, 7, False), file, **options)
    holds(onnx_run(file), model, names)


# Sentence encoders


def encoder(*modules: after.Module) -> SentenceEncoder:
    """Of a random BERT; it has no tokenizer."""
    model = SentenceEncoder.__new__(SentenceEncoder)
    nn.Module.__init__(model)
    model.transformer = nn.Module()
    model.transformer.model = made("bert", "base")
    model.heads = nn.ModuleList(modules).eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():  # made without values
            parameter.normal_(0.0, 0.3)
    return model


MODULES: dict[str, Callable[[], list[after.Module]]] = {
    "mean": lambda: [after.Pooling(12), after.Normalize()],
    "all": lambda: [after.Pooling(12, list(after.MODES)), after.Dense(72, 5), after.Normalize()],
    "last": lambda: [after.Pooling(12, "lasttoken", include_prompt=False)],
}


def embeddings(model: SentenceEncoder, ids: Tensor, mask: Tensor, **more: Any) -> Tensor:
    found: Tensor = model({"input_ids": ids, "attention_mask": mask, **more})["sentence_embedding"]
    return found


class Vectors(nn.Module):
    """A sentence encoder as a function of tensors."""

    def __init__(self, model: SentenceEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return embeddings(self.model, input_ids, attention_mask)


@pytest.mark.parametrize(
    "kind", [kind if kind == "all" else pytest.param(kind, marks=pytest.mark.slow) for kind in MODULES]
)
@pytest.mark.parametrize("skipped", [0, 2])
def test_trace_of_a_sentence_encoder(kind: str, skipped: int) -> None:
    torch.manual_seed(3)
    model = encoder(*MODULES[kind]())
    more = {"prompt_length": torch.tensor(skipped)} if skipped else {}
    ids, mask = batch(2, 7, False)
    given = {"input_ids": ids, "attention_mask": mask, **more}
    traced = torch.jit.trace(model, (given,), strict=False)
    for size in SIZES:
        ids, mask = batch(*size)
        with torch.no_grad():
            found = traced({"input_ids": ids, "attention_mask": mask, **more})
            assert_close(found["sentence_embedding"], embeddings(model, ids, mask, **more), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODULES)
def test_onnx_of_a_sentence_encoder(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(3)
    model, file = Vectors(encoder(*MODULES[kind]())), tmp_path / "model.onnx"
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["sentence_embedding"]}
    torch.onnx.export(model, batch(2, 7, False), file, dynamo=True, dynamic_shapes=open_sizes(), **names)
    run = onnx_run(file)
    for size in SIZES:
        with torch.no_grad():
            assert_close(torch.as_tensor(run(*batch(*size))[0]), model(*batch(*size)), atol=1e-4)


@pytest.mark.slow
def test_compiled_sentence_encoder() -> None:
    torch._dynamo.reset()
    torch.manual_seed(3)
    model = Vectors(encoder(*MODULES["all"]()))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size in SIZES:
        with torch.no_grad():
            assert_close(compiled(*batch(*size)), model(*batch(*size)), atol=1e-5)
