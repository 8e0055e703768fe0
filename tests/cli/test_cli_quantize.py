"""`minilm quantize`: the folder that it writes, the figures that it prints, and the errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cli_runs import failure, records, run, save_chat_model
from close import assert_close
from tiny_models import TEXTS, save_decoder, save_model

import minilm
from minilm.conversion.quantization import quantize, shipped_texts
from minilm.quantized import quantized_matrices

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def _specification(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how fast implementations round."""
    monkeypatch.setenv("MINILM_BACKEND", "torch,reference")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "encoder", "bert", **SIZES)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def test_an_encoder(encoder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run("quantize", encoder, out, "--weights", "int8", "--texts", texts).stdout.splitlines()
    assert shown[0].startswith(f"{out}: BertModel, ")
    assert shown[0].endswith("parameters, 8 matrices in int8")
    before, after = ((f / "model.safetensors").stat().st_size for f in (encoder, out))
    assert after < before
    assert shown[1] == f"weights: {before / 1e3:.3g} kB before, {after / 1e3:.3g} kB now"
    plain, found = (
        torch.from_numpy(minilm.SentenceEncoder(f, device="cpu").encode(TEXTS)).double()
        for f in (encoder, out)
    )
    cosines = torch.cosine_similarity(plain, found)
    assert 0.9 < float(cosines.min()) < 1
    assert shown[2] == (
        f"cosine of embeddings with those in float32: {float(cosines.mean()):.6f} on average, "
        f"{float(cosines.min()):.6f} at the worst, of {len(TEXTS)} texts"
    )
    assert len(shown) == 3
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "minilm", "format": "int8"}
    # every command takes the folder as it is, and the same weights from the original
    quantised = records("embed", "--model", out, *TEXTS)
    made = records("embed", "--model", encoder, "--weights", "int8", *TEXTS)
    assert quantised == made
    summary = json.loads(run("inspect", out, "--json").stdout)
    kinds = {entry["dtype"] for entry in summary["weight_map"]}
    assert kinds == {"F32", "INT8"}
    assert summary["parameters"] == json.loads(run("inspect", encoder, "--json").stdout)["parameters"]
    assert "INT8" in run("inspect", out, "--weights").stdout


def test_a_decoder(texts: Path, tmp_path: Path) -> None:
    source, out = save_decoder(tmp_path / "in", "llama"), tmp_path / "out"
    source_config = json.loads((source / "config.json").read_text())
    assert source_config["hidden_size"] == 24  # int8 has no groups to fill
    command = ("quantize", source, out, "-w", "int8", "--texts", texts, "--tokens", "50", "--json")
    record = json.loads(run(*command).stdout)
    assert record["formats"] == {"int8": 10}
    assert record["not_quantised"] == {}
    assert record["architecture"] == "LlamaForCausalLM"
    assert record["bytes_after"] == (out / "model.safetensors").stat().st_size
    error = record["error"]
    assert error["tokens"] == 50
    assert math.isfinite(error["quantised"])
    assert error["quantised"] != error["floating"]
    assert error["quantised"] == pytest.approx(error["floating"], rel=0.2)
    line = run(*command[:-1], "--force").stdout.splitlines()[-1]
    change = 100 * (error["quantised"] / error["floating"] - 1)
    assert line == (
        f"perplexity: {error['floating']:.4g} in float32, {error['quantised']:.4g} now ({change:+.2f} %), "
        "on 50 tokens"
    )
    for more in ([], ["--weights", "int8"]):
        model = out if not more else source
        (answer,) = records("generate", "--model", model, "--max-tokens", "5", *more, "anna")
        assert answer["token_ids"]
        if not more:
            first = answer
    assert answer == first


def test_texts_that_come_with_python() -> None:
    texts = shipped_texts(40)
    assert len(set(texts)) == 40
    assert all(len(text.split()) > 5 for text in texts)
    assert texts == shipped_texts(50)[:40]


def test_its_own_texts_are_the_default(encoder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="were cut"):  # the model reads 64 tokens
        done = quantize(encoder, tmp_path / "out", weights="q8")
    with pytest.warns(UserWarning, match="were cut"):
        again = quantize(encoder, tmp_path / "two", weights="q8", texts=shipped_texts())
    assert done.error is not None
    assert done.error == again.error
    assert done.conversion.quantised == {"q8_0": 8}


def test_what_could_not_be_done_is_told(texts: Path, tmp_path: Path) -> None:
    odd = save_model(tmp_path / "in", "bert", hidden_size=64, num_attention_heads=4, intermediate_size=40)
    result = run("quantize", odd, tmp_path / "out", "--texts", texts)
    warnings = [line for line in result.stderr.splitlines() if "mlp.down.weight is not quantised" in line]
    assert len(warnings) == 2
    assert all("40 columns are not a multiple of 32" in line for line in warnings)
    assert "6 matrices in q4_1" in result.stdout
    for file in odd.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    result = run("quantize", odd, tmp_path / "bare", "-w", "int8", "--texts", texts)
    assert "has no tokenizer, so the error was not measured" in result.stderr
    assert "cosine" not in result.stdout


def test_failures_leave_nothing(encoder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        ([encoder, out, "-w", "q3"], "weights must be one of int8"),
        ([encoder, out, "-w", "gguf"], "is not one"),
        ([encoder, out, "--texts", tmp_path / "nowhere.txt"], "nowhere.txt"),
        ([tmp_path / "nothing", out], "nothing"),
        ([encoder, texts], "this is a file"),
        ([encoder, encoder], "the destination is the folder of the source"),
    ):
        assert message in failure("quantize", *arguments)
        assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert "--force" in failure("quantize", encoder, out, "--texts", texts)
    run("quantize", encoder, out, "--texts", texts, "--force", "-w", "int8")
    assert (out / "mine.txt").read_text() == "keep"
    assert "already quantised to int8" in failure("quantize", out, tmp_path / "again", "-w", "q8")


def test_convert_makes_it_floating_again(encoder: Path, texts: Path, tmp_path: Path) -> None:
    """`minilm convert` writes folders that transformers loads, of whatever there is."""
    import transformers

    run("quantize", encoder, tmp_path / "q", "--texts", texts, "-w", "q8")
    run("convert", tmp_path / "q", tmp_path / "f")
    quantised = minilm.AutoModel.from_pretrained(tmp_path / "q")
    assert len(quantized_matrices(quantised)) == 8
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "f").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), minilm.backend("reference"):  # the native kernels quantise activations, too
        assert_close(quantised(ids).last_hidden_state, theirs(ids).last_hidden_state)


def test_chat_with_fewer_bits(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path)
    (answer,) = records("chat", "--model", model, "--weights", "int8", "--max-tokens", "4", "--json", "hello")
    assert len(answer["token_ids"]) == 4


def test_tasks_take_weights(tmp_path: Path) -> None:
    model = save_model(tmp_path, "bert", "ForMaskedLM", **SIZES)
    (found,) = records("fill-mask", "--model", model, "--weights", "q8", "the [MASK] of Paris")
    assert len(found["masks"][0]) == 5
    assert "weights must be one of" in failure("fill-mask", "--model", model, "--weights", "8", "[MASK]")
