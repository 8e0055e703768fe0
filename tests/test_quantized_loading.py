"""Quantised models: what loading makes of a checkpoint, what saving keeps of it, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from close import assert_close
from gguf import GGMLQuantizationType
from gguf.quants import quantize as gguf_quantize
from gguf_files import blocks_of, write_model
from safetensors.torch import load_file, save_file
from tiny_decoders import decoder
from tiny_models import TEXTS, save_model
from torch import Tensor, nn

import minilm
from minilm.config import ConfigError
from minilm.evaluation.scores import likeness, perplexity
from minilm.files.checkpoint import WeightError
from minilm.ops import backend
from minilm.ops.quantized import dequantise, quantise
from minilm.quantized import Quantized, QuantizedEmbedding, QuantizedLinear, quantized_matrices

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 61,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("ForMaskedLM", SIZES),
    "distilbert": (
        "ForSequenceClassification",
        {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 61},
    ),
    "gpt2": ("LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61}),
    "llama": ("ForCausalLM", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": ("ForCausalLM", {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "phi3": ("ForCausalLM", {**SIZES, "num_key_value_heads": 2, "pad_token_id": None}),
}
PREFIX = {
    "bert": "Bert",
    "distilbert": "DistilBert",
    "gpt2": "GPT2",
    "llama": "Llama",
    "qwen2": "Qwen2",
    "phi3": "Phi3",
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23, 24, 25, 26]])


@pytest.fixture(autouse=True)
def _specification() -> Iterator[None]:
    """Loading is tested here, not how fast implementations round."""
    with backend("torch", "reference"):
        yield


@cache
def _home() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="quantised"))


@cache
def reference(family: str, **options: Any) -> Any:
    """A random model of transformers."""
    head, sizes = MODELS[family]
    special = {} if family in ("bert", "distilbert") else {"bos_token_id": 1, "eos_token_id": 1}
    config = transformers.AutoConfig.for_model(family, **{**sizes, **special, **options})
    torch.manual_seed(len(family))
    model = getattr(transformers, PREFIX[family] + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.2)
    return model


@cache
def folder(family: str, **options: Any) -> Path:
    """It, as transformers saves it."""
    path = _home() / "-".join([family, *(f"{k}{v}" for k, v in options.items())])
    reference(family, **options).save_pretrained(path)
    return path


def load(family: str, source: Path | None = None, **options: Any) -> Any:
    cls = getattr(minilm, PREFIX[family] + MODELS[family][0])
    return cls.from_pretrained(folder(family) if source is None else source, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def planes(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def expected_formats(family: str, model: Any, format: str) -> dict[str, str]:
    """Our names of what is to be quantised, written down for themselves."""
    layer = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    found = {f"body.layers.{i}.{part}.weight": format for i in range(2) for part in layer}
    if family not in ("bert", "distilbert"):
        found["body.embeddings.tokens.weight"] = "q8_0"
        if family in ("qwen2", "phi3"):
            found["head.decoder.weight"] = "q8_0"
    return found


# --- loading ---


EVERY = [
    ("bert", "int8"),
    ("bert", "q4_1"),
    ("distilbert", "q8_0"),
    ("gpt2", "int8"),
    ("gpt2", "q4_0"),
    ("llama", "q8_0"),
    ("llama", "q4_1"),
    ("qwen2", "q4_0"),
    ("phi3", "int8"),
]
"""Every family, and each format in an encoder and a decoder or more."""


@pytest.mark.parametrize(("family", "format"), EVERY)
def test_it_is_the_model_with_rounded_weights(family: str, format: str) -> None:
    """Which matrices are quantised, to what, from fused and transposed ones too; the answers are exactly
    those of the floating model whose matrices were rounded."""
    quantised, floating = load(family, weights=format), load(family)
    report = quantised.load_report
    assert report.quantised == expected_formats(family, quantised, format)
    assert not report.floating
    assert not report.requantised
    for name, kind in report.quantised.items():
        parameter = floating.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(dequantise(quantise(parameter, kind), torch.float32))
    assert torch.equal(logits(quantised), logits(floating))
    rest = {name for name, _ in floating.named_parameters()} - report.quantised.keys()
    assert {name for name, _ in quantised.named_parameters()} == rest
    assert quantised.num_parameters() == floating.num_parameters()
    exclude = {"exclude_embeddings": True}
    assert quantised.num_parameters(**exclude) == floating.num_parameters(**exclude)
    matrices = sum(matrix.nbytes for matrix in quantized_matrices(quantised).values())
    others = sum(p.nbytes for p in quantised.parameters())
    assert quantised.get_memory_footprint() == matrices + others < floating.get_memory_footprint() / 1.5


@pytest.mark.parametrize(("short", "format"), [("q8", "q8_0"), ("q4", "q4_1")])
def test_short_names(short: str, format: str) -> None:
    assert same(planes(load("llama", weights=short)), planes(load("llama", weights=format)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_dtype_is_that_of_the_rest(family: str, dtype: torch.dtype) -> None:
    """Codes are made of the checkpoint's own values, whatever the activations are."""
    model = load(family, weights="q8_0", dtype=dtype)
    assert model.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    exact = quantized_matrices(load(family, weights="q8_0"))
    for name, matrix in quantized_matrices(model).items():
        assert same(matrix.planes, exact[name].planes)
    assert logits(model).dtype == dtype
    later = load(family, weights="q8_0").to(dtype)
    assert torch.equal(logits(later), logits(model))
    if family == "llama":
        assert model.new_cache(1).k_pages[0].dtype == dtype


def test_a_quantised_model_is_for_inference() -> None:
    model = load("llama", weights="q4")
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(IDS).logits.requires_grad
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()
    with pytest.raises(ValueError, match="q8_0 cannot be resized"):
        model.resize_token_embeddings(70)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    other = load("llama", weights="q4")
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_prefill_and_decode_are_one_forward_pass() -> None:
    model = load("llama", weights="q4_0")
    with torch.no_grad():
        first = model(IDS[:, :4], use_cache=True)
        second = model(IDS[:, 4:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, second.logits], dim=1), logits(model))
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_the_base_model_of_a_causal_lm_is_quantised_too() -> None:
    model = minilm.AutoModel.from_pretrained(folder("llama"), weights="q8_0")
    assert isinstance(model.body.embeddings.tokens, QuantizedEmbedding)
    assert len(model.load_report.quantised) == 9


@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q4_1"])
def test_layers_that_do_not_fit_stay_and_are_told(format: str, caplog: pytest.LogCaptureFixture) -> None:
    """72 inner channels: the last matrix of each layer has rows of 72."""
    model = load("llama", folder("llama", intermediate_size=72), weights=format)
    report = model.load_report
    assert set(report.floating) == {f"body.layers.{i}.mlp.down.weight" for i in range(2)}
    assert all("72 columns are not a multiple of 32" in reason for reason in report.floating.values())
    assert "mlp.down.weight is not quantised" in caplog.text
    assert "not quantised: body.layers.0.mlp.down.weight (" in str(report)
    assert f"6 matrices in {format}" in str(report) or "7 matrices in q8_0" in str(report)
    assert torch.isfinite(logits(model)).all()
    assert isinstance(model.body.layers[0].mlp.down, nn.Linear)
    whole = load("llama", folder("llama", intermediate_size=72), weights="int8")  # which has no groups
    assert not whole.load_report.floating


def test_models_without_a_matrix_that_fits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no matrix .* 24 columns are not a multiple of 32"):
        minilm.AutoModel.from_pretrained(save_model(tmp_path, "bert"), weights="q4")
    with pytest.raises(ValueError, match="it has none"):
        load("bert", folder("bert", num_hidden_layers=0), weights="int8")


@pytest.mark.parametrize("weights", ["int4", "q5_0", "", "Q8_0", "fp8"])
def test_formats_that_there_are_not(weights: str) -> None:
    with pytest.raises(ValueError, match=f"weights must be one of int8, .*and is '{weights}'"):
        load("bert", weights=weights)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e9])
def test_values_that_cannot_be_quantised(value: float, tmp_path: Path) -> None:
    key = "model.layers.1.self_attn.k_proj.weight"
    edit(folder("llama"), tmp_path, lambda tensors: tensors[key].__setitem__((3, 5), value))
    with pytest.raises(WeightError, match=rf"k_proj\.weight.*{'1e.09' if value == 1e9 else 'NaN or inf'}"):
        load("llama", tmp_path, weights="q8_0")


# --- saving, and loading what was saved ---


@pytest.mark.parametrize(("family", "format"), EVERY)
def test_saved_and_loaded_bit_by_bit(family: str, format: str, tmp_path: Path) -> None:
    model = load(family, weights=format, dtype=torch.bfloat16 if format == "q4_0" else None)
    model.save_pretrained(tmp_path / "a", max_shard_size="5GB" if format != "q8_0" else "20KB")
    given = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert given == {"quant_method": "minilm", "format": format}
    again = load(family, tmp_path / "a")
    assert same(planes(again), planes(model))
    assert again.dtype == model.dtype
    assert torch.equal(logits(again), logits(model))
    assert again.load_report.quantised == model.load_report.quantised
    assert not any(p.requires_grad for p in again.parameters())
    again.save_pretrained(tmp_path / "b", max_shard_size="5GB" if format != "q8_0" else "20KB")
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    assert len([f for f in files if f.endswith(".safetensors")]) > (1 if format == "q8_0" else 0)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen2"])
def test_the_way_back(family: str, tmp_path: Path) -> None:
    """weights="float" dequantises, and what it makes of a folder is a model of transformers again."""
    model = load(family, weights="q8_0")
    model.save_pretrained(tmp_path / "a")
    floating = load(family, tmp_path / "a", weights="float")
    assert not quantized_matrices(floating)
    for name, matrix in quantized_matrices(model).items():
        assert torch.equal(floating.get_parameter(name), dequantise(matrix, torch.float32)), name
    floating.save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    theirs = type(reference(family)).from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert_close(logits(model), theirs(IDS).logits)


def test_what_is_quantised_already(tmp_path: Path) -> None:
    model = load("llama", weights="q4")
    model.save_pretrained(tmp_path)
    assert same(planes(load("llama", tmp_path, weights="q4")), planes(model))  # asked for what it is
    with pytest.raises(ValueError, match="already quantised to q4_1: quantise the original to q8_0"):
        load("llama", tmp_path, weights="q8")
    with pytest.raises(ValueError, match="keeps the formats of a GGUF file"):
        load("llama", tmp_path, weights="gguf")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"bits": 4}, "bits"),
        ("int8", "int8"),
    ],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_others_methods_are_named(family: str, given: Any, named: str, tmp_path: Path) -> None:
    edit(folder(family), tmp_path, lambda tensors: None, quantization_config=given)
    with pytest.raises(ConfigError, match=f"quantization_config says .*{named}.*does not read"):
        load(family, tmp_path)


# --- damaged and hostile folders ---


def edit(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> None:
    """A copy of a folder whose tensors (of one file) and config.json are changed."""
    target.mkdir(exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors")
    options = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(options))


Q = "model.layers.0.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scale": (lambda t: t.pop(f"{Q}.scale"), r"q_proj\.weight has codes U8, minimum F16, which is none"),
    "no minimum": (
        lambda t: t.pop(f"{Q}.minimum"),
        r"quantised as 'q4_1', and the tensors are those of 'mixed'",
    ),
    "no codes": (lambda t: t.pop(f"{Q}.codes"), r"q_proj\.weight\.(scale|minimum) is there without .*codes"),
    "nothing": (lambda t: [t.pop(f"{Q}.{p}") for p in ("codes", "scale", "minimum")], r"missing .*q_proj"),
    "scale in float32": (
        lambda t: t.update({f"{Q}.scale": t[f"{Q}.scale"].float()}),
        "scale F32.*which is none of int8, q8_0",
    ),
    "a column of scales too few": (
        lambda t: t.update({f"{Q}.scale": t[f"{Q}.scale"][:, :1]}),
        r"q_proj\.weight\.scale has shape \[64, 1\], expected \[64, 2\] for a q4_1 matrix \[64, 64\]",
    ),
    "codes of one dimension": (
        lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"].flatten()}),
        r"codes has shape \[2048\], expected two sizes",
    ),
    "codes of three dimensions": (
        lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"][None]}),
        "expected two sizes",
    ),
    "codes without columns": (lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"][:, :0]}), "columns"),
    "half a group": (lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"][:, :24]}), "48 columns"),
    "a row too few": (
        lambda t: t.update({f"{Q}.{p}": t[f"{Q}.{p}"][:63] for p in ("codes", "scale", "minimum")}),
        r"q_proj\.weight has shape \[63, 64\], expected \[64, 64\]",
    ),
    "twice": (lambda t: t.update({Q: torch.ones(64, 64)}), "twice, quantised and not"),
    "a plane more": (lambda t: t.update({f"{Q}.zeros": torch.ones(64)}), r"surplus tensor .*zeros"),
    "codes of a norm": (
        lambda t: t.update({"model.norm.weight.codes": torch.ones(2, 32, dtype=torch.int8)}),
        "norm.weight is there twice",
    ),
    "codes of nothing": (
        lambda t: t.update({"model.extra.weight.codes": torch.ones(2, 32, dtype=torch.int8)}),
        "extra.weight has codes I8, which is none",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_folders(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    load("llama", weights="q4_1").save_pretrained(tmp_path / "good")
    edit(tmp_path / "good", tmp_path / "bad", change)
    with pytest.raises(WeightError, match=message):
        load("llama", tmp_path / "bad")


def test_a_truncated_folder(tmp_path: Path) -> None:
    load("bert", weights="int8").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightError, match="not a valid safetensors file"):
        load("bert", tmp_path)


def test_codes_beyond_int8s_range(tmp_path: Path) -> None:
    key = "bert.encoder.layer.0.output.dense.weight.codes"
    load("bert", weights="int8").save_pretrained(tmp_path / "good")
    edit(tmp_path / "good", tmp_path / "bad", lambda t: t[key].__setitem__((2, 3), -128))
    with pytest.raises(WeightError, match=r"output\.dense\.weight\.codes holds -128"):
        load("bert", tmp_path / "bad")


def test_scales_that_are_not_finite_are_told(tmp_path: Path) -> None:
    load("llama", weights="q4_1").save_pretrained(tmp_path / "good")
    edit(tmp_path / "good", tmp_path / "bad", lambda t: t[f"{Q}.scale"].__setitem__((2, 1), math.inf))
    with pytest.warns(UserWarning, match=r"NaN or infinite values.*q_proj"):
        model = load("llama", tmp_path / "bad")
    assert model.load_report.nan == [Q]


def test_a_configuration_that_promises_codes(tmp_path: Path) -> None:
    edit(folder("bert"), tmp_path, lambda t: None, quantization_config={"quant_method": "minilm"})
    with pytest.raises(WeightError, match="says that the weights are quantised"):
        load("bert", tmp_path)


# --- GGUF ---


def gguf(tmp_path: Path, kinds: Callable[[str], str | None]) -> Path:
    """The random Llama as a GGUF file; `kinds` tells the type of a tensor by its name there, None for F32."""
    path = write_model(tmp_path / "plain.gguf", reference("llama"))
    from gguf import GGUFReader

    changed = {}
    for tensor in GGUFReader(path).tensors:
        kind = kinds(tensor.name)
        if kind is not None:
            values = np.array(tensor.data).reshape([int(n) for n in tensor.shape[::-1]])
            changed[tensor.name] = (
                gguf_quantize(values, GGMLQuantizationType[kind]),
                GGMLQuantizationType[kind],
            )
    return write_model(tmp_path / "model.gguf", reference("llama"), **changed)


def is_matrix(name: str) -> bool:
    return name.endswith("weight") and "norm" not in name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_gguf_is_kept_as_it_is(kind: str, tmp_path: Path) -> None:
    """q and k have their rows in another order there; the answers are those of the dequantised model."""
    path = gguf(tmp_path, lambda name: kind if is_matrix(name) else None)
    kept, dequantised = load("llama", path, weights="gguf"), load("llama", path)
    assert kept.load_report.quantised == dict.fromkeys(expected_formats("llama", kept, ""), kind.lower())
    assert not quantized_matrices(dequantised)
    for name, matrix in quantized_matrices(kept).items():
        assert torch.equal(dequantise(matrix, torch.float32), dequantised.get_parameter(name)), name
    assert torch.equal(logits(kept), logits(dequantised))
    kept.save_pretrained(tmp_path / "saved")
    assert same(planes(load("llama", tmp_path / "saved")), planes(kept))
    if kind != "Q8_0":  # q4 asks for the layers' format, and for 8 bits of the table
        assert load("llama", path, weights=kind.lower()).load_report.quantised[Q_OURS] == kind.lower()


Q_OURS = "body.layers.0.attention.qkv.weight"


def test_parts_in_several_formats_are_requantised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {"attn_q": "Q8_0", "attn_k": "Q4_1", "attn_v": "Q4_1", "ffn_gate": "Q4_0", "ffn_down": "Q4_0"}
    path = gguf(tmp_path, lambda name: kinds.get(name.split(".")[-2]) if name.startswith("blk.0") else None)
    kept, dequantised = load("llama", path, weights="gguf"), load("llama", path)
    report = kept.load_report
    up = "body.layers.0.mlp.up.weight"
    assert report.quantised == {Q_OURS: "q8_0", up: "q8_0", "body.layers.0.mlp.down.weight": "q4_0"}
    assert report.requantised == {
        Q_OURS: "its parts are stored as Q8_0 and Q4_1",
        up: "its parts are stored as Q4_0 and F32",
    }
    assert not report.floating  # what is F32 there is kept as it is
    assert f"{Q_OURS} is in q8_0: its parts are stored as Q8_0 and Q4_1" in caplog.text
    assert f"requantised to q8_0: {up} (its parts" in str(report)
    for name in (Q_OURS, up):
        expected = quantise(dequantised.get_parameter(name), "q8_0")
        assert same(quantized_matrices(kept)[name].planes, expected.planes)
    assert kept.config.quantization_config["format"] == "mixed"
    kept.save_pretrained(tmp_path / "saved")
    assert same(planes(load("llama", tmp_path / "saved")), planes(kept))


def test_other_types_stay_floating(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256}
    data = blocks_of(GGMLQuantizationType.Q4_K, 256, 1, 3)
    extra = {"blk.0.attn_output.weight": (data, GGMLQuantizationType.Q4_K)}
    model = load(
        "llama", write_model(tmp_path / "k.gguf", reference("llama", **wide), **extra), weights="gguf"
    )
    assert (
        model.load_report.floating["body.layers.0.attention.out.weight"] == "stored as Q4_K, and dequantised"
    )
    assert not model.load_report.quantised
    assert all(p.requires_grad for p in model.parameters())


def test_gguf_asks_for_a_gguf_file() -> None:
    with pytest.raises(ValueError, match="weights='gguf' keeps the formats of a GGUF file"):
        load("llama", weights="gguf")


# --- memory ---

MEASURE = """
import sys, torch
from minilm import AutoModelForCausalLM
from pathlib import Path
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
AutoModelForCausalLM.from_pretrained(sys.argv[1], weights="q8_0")  # libraries come in at first use
before = peak()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], weights="q8_0")
print(peak() - before, model.get_memory_footprint())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_that_of_the_result_and_one_matrix(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
    config = transformers.LlamaConfig(**{**MODELS["llama"][1], **sizes}, bos_token_id=1, eos_token_id=1)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(folder("llama")), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    matrix = 2 * 1536 * 512 * 4  # gate and up in float32
    beyond = []
    for _ in range(3):  # a machine short of memory gives pages back and forth, and they are counted again
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        used, weights = map(int, result.stdout.split())
        # Beyond result and matrix: what quantising a piece of it takes, and a window of the file.
        beyond.append(used - 1.05 * weights - matrix)
        if beyond[-1] < 24e6:
            break
    assert weights < 45e6  # in float32 it would be 151 MB
    assert min(beyond) < 24e6, f"{min(beyond) / 1e6:.1f} MB beyond the weights and a matrix"


# --- what is built on it ---


def quantised_layers(model: nn.Module) -> int:
    return sum(isinstance(module, Quantized) for module in model.modules())


def test_sentences_and_pairs(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    source = save_model(tmp_path / "base", "bert", **sizes)
    plain = minilm.SentenceEncoder(source, device="cpu")
    encoder = minilm.SentenceEncoder(source, device="cpu", weights="int8")
    assert quantised_layers(encoder) == 8
    with torch.inference_mode():
        found = likeness(*(torch.from_numpy(m.encode(TEXTS)) for m in (encoder, plain)))
    assert 0.98 < found.worst <= found.mean < 1
    encoder.save(str(tmp_path / "saved"))
    again = minilm.SentenceEncoder(tmp_path / "saved", device="cpu")
    assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    scorer = save_model(tmp_path / "pairs", "bert", "ForSequenceClassification", **sizes)
    cross = minilm.CrossEncoder(scorer, device="cpu", weights="q8")
    assert quantised_layers(cross) == 8
    assert isinstance(cross.model.head.out, nn.Linear)
    assert len(cross.predict([("a", "b"), ("c", "d")])) == 2
    pipe = minilm.pipeline("text-classification", scorer, weights="int8", device="cpu")
    assert quantised_layers(pipe.model) == 8
    with pytest.raises(ValueError, match="give the model's name"):
        minilm.pipeline("text-classification", pipe.model, tokenizer=pipe.tokenizer, weights="int8")


def test_llm() -> None:
    d = decoder("llama", hidden_size=64)
    llm = minilm.LLM(d.folder, weights="q4", device="cpu")
    assert isinstance(llm.model.body.layers[0].attention.qkv, QuantizedLinear)
    params = minilm.SamplingParams(temperature=0, max_tokens=8)
    (answer,) = llm.generate(["The cat"], params, use_tqdm=False)
    loaded = minilm.AutoModelForCausalLM.from_pretrained(d.folder, weights="q4")
    ids = torch.tensor([answer.prompt_token_ids])
    text = loaded.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert text[: len(answer.outputs[0].token_ids)] == list(answer.outputs[0].token_ids)
    with pytest.raises(ValueError, match="give the model's name"):
        minilm.LLM(loaded, tokenizer=d.tokenizer, weights="q4")


# --- how good ---


@pytest.mark.parametrize(("window", "stride"), [(64, None), (16, 4), (7, 6), (2, 1), (16, 15)])
def test_perplexity_is_what_its_definition_says(window: int, stride: int | None) -> None:
    """Token by token: each is asked for in the first window that reaches it."""
    model = load("llama")
    tokens = torch.randint(2, 61, (41,), generator=torch.Generator().manual_seed(1)).tolist()
    step = max(1, window // 2) if stride is None else stride
    total, position, start = 0.0, 1, 0
    while position < len(tokens):
        while position >= start + window:
            start += step
        with torch.no_grad():
            scores = model(torch.tensor([tokens[start:position]])).logits[0, -1].double()
        total -= float(scores.log_softmax(-1)[tokens[position]])
        position += 1
    expected = math.exp(total / (len(tokens) - 1))
    assert perplexity(model, tokens, window, stride) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, torch.tensor(tokens), window, stride) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_little_is_refused() -> None:
    model = load("llama")
    for tokens, window, stride, message in (
        ([3], 8, None, "at least 2 tokens"),
        ([3, 4, 5], 1, None, "window"),
        ([3, 4, 5], 8, 8, "stride must be"),
        ([3, 4, 5], 8, 0, "stride must be"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity(model, tokens, window, stride)


def test_likeness() -> None:
    vectors = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    found = likeness(vectors, torch.tensor([[2.0, 0.0], [4.0, 3.0]]))
    assert (found.mean, found.worst, found.count) == pytest.approx((0.98, 0.96, 2))
    assert math.isnan(likeness(vectors * math.nan, vectors).worst)
    with pytest.raises(ValueError, match=r"\[2, 2\] and \[1, 2\]"):
        likeness(vectors, vectors[:1])


@pytest.mark.slow
def test_the_real_model() -> None:
    """SmolLM2 as shipped, and in 8 bits beside float32."""
    name = "SmolLM2-135M-Instruct"
    floating = minilm.AutoModelForCausalLM.from_pretrained(name)
    ids = minilm.AutoTokenizer.from_pretrained(name)(PROSE)["input_ids"]
    kept = minilm.AutoModelForCausalLM.from_pretrained(name, weights="gguf")
    kinds = kept.load_report.quantised
    assert kinds.pop("body.embeddings.tokens.weight") == "q8_0"
    assert list(kinds.values()) == ["q4_1"] * 120
    assert kept.get_memory_footprint() < 97e6
    short = torch.tensor([ids[:24]])
    with torch.no_grad():
        assert_close(kept(short).logits, floating(short).logits, atol=2e-4)
    del kept
    before = perplexity(floating, ids)
    del floating
    after = perplexity(minilm.AutoModelForCausalLM.from_pretrained(name, weights="q8_0"), ids)
    assert 5 < before < 60
    assert abs(after / before - 1) < 0.005


PROSE = """The sea has always been close to the people of this coast. In summer the children run down to the
beach before breakfast, and in winter the old men sit by the window of the harbour inn and tell each other
which ship is late. When the storm came in the autumn of that year, nobody in the village was surprised. The
birds had left early, the fishermen said, and the wind had turned twice in one night. They pulled their boats
far up on the sand, closed the shutters, and waited. For two days there was nothing to be heard but the wind.
On the third morning the sky was clear, and the whole village went out to see what was left. The school had
lost its roof, and the road to the town was under water, but the houses stood, and all the boats were there.
""".replace("\n", " ")
