"""Quantised checkpoints that have lost a plane of a matrix: no other format is taken for what was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minilm


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    config = minilm.AutoConfig.for_model(
        "llama",
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    minilm.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "float")
    model = minilm.AutoModelForCausalLM.from_pretrained(folder / "float", weights="q4_1")
    model.save_pretrained(folder / "q4")
    return folder / "q4" / "model.safetensors"


def test_each_plane(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved)
    (tmp_path / "config.json").write_bytes((saved.parent / "config.json").read_bytes())
    planes = [name for name in tensors if name.endswith((".codes", ".scale", ".minimum"))]
    assert len(planes) > 20
    for name in planes:
        for other in (None, "stray", f"{name[:-3]}xyz"):
            changed = {key: value for key, value in tensors.items() if key != name}
            if other is not None:
                changed[other] = tensors[name]
            save_file(changed, tmp_path / "model.safetensors")
            with pytest.raises(minilm.WeightError, match=r"(model\.safetensors|lm_head|q4_1)"):
                minilm.AutoModelForCausalLM.from_pretrained(tmp_path)
