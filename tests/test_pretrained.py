"""Checkpoints as models see them: what minilm saves, transformers loads, and the other way round; fresh heads; refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from pairs import class_of, heads_of, pair
from strategies import FAMILIES, Batch, Config, configs, examples, seeds

from minilm.archs.family import Head

EVERY_HEAD = [(family, head) for family in FAMILIES for head in heads_of(family)]

SMALL: dict[str, Config] = {
    "bert": {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 17},
    "roberta": {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 17},
    "xlm-roberta": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 17,
    },
    "distilbert": {"dim": 12, "n_heads": 3, "n_layers": 2, "hidden_dim": 17},
    "gpt2": {
        "n_embd": 12,
        "n_head": 3,
        "n_layer": 2,
        "n_positions": 30,
        "pad_token_id": 0,
        "eos_token_id": 3,
    },
    "llama": {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 17},
    "mistral": {
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
    },
    "qwen2": {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 2},
    "qwen3": {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2},
}
"""One configuration of each family, for tests whose subject is not the configuration."""


def small(family: str, **options: Any) -> Config:
    """The small configuration of a family, with other options."""
    config = {"model_type": family, "vocab_size": 41, **SMALL[family]}
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        config |= {"intermediate_size": 17, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config |= {"head_dim": 4, "max_position_embeddings": 64}
    elif family != "gpt2":
        config["max_position_embeddings"] = 33
    return {**config, **options}


BATCH = Batch(lengths=(7, 3, 1), left=False, extra=1, seed=5)


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_transformers_loads_what_minilm_saves(family: str, head: Head, tmp_path: Path) -> None:
    @examples(3)
    @given(configs(family), seeds())
    def check(config: Config, seed: int) -> None:
        with pair(config, head, seed) as p:
            p.model.save_pretrained(tmp_path)
            theirs, report = class_of(transformers, family, head).from_pretrained(
                tmp_path, output_loading_info=True
            )
        assert not any(report.values()), f"{config}: {report}"
        values = theirs.state_dict()
        for name, value in p.reference.state_dict().items():
            if name in (
                "cls.predictions.bias",
                "lm_head.bias",
            ):  # not used, unless it is decoder.bias as well
                continue
            assert torch.equal(values[name], value), name
        before, after = p.reference.config.to_dict(), theirs.config.to_dict()
        for key in before.keys() - {"architectures", "dtype", "_name_or_path"}:
            assert before[key] == after.get(key), f"{key} was {before[key]} and became {after.get(key)}"
        shutil.rmtree(tmp_path)

    check()


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_saving_again_gives_the_same_bytes(family: str, head: Head, tmp_path: Path) -> None:
    @examples(2)
    @given(configs(family), seeds())
    def check(config: Config, seed: int) -> None:
        with pair(config, head, seed) as p:
            p.model.save_pretrained(tmp_path / "a")
        type(p.model).from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        files = sorted(f.name for f in (tmp_path / "a").iterdir())
        assert files == sorted(f.name for f in (tmp_path / "b").iterdir())
        for file in files:
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
        shutil.rmtree(tmp_path)

    check()
