"""Properties of a checkpoint's weights: naming scheme, tied output matrix, quantisation format, and the
configuration if the weights contain it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ConfigError
from ..files import (
    INDEX,
    MOST_CONFIG,
    SINGLE,
    Checkpoint,
    SafetensorsCheckpoint,
    WeightError,
    has_file,
    open_checkpoint,
    parse_json,
)
from .rules import Rule, copy, ignore

CONFIG_KEY = "minilm.config"
"""The tensor that holds the text of config.json in files to which other libraries write a model's state dict
(transformers' Trainer)."""
CONFIG_RULE = ignore(CONFIG_KEY, "the configuration")


def config_tensor(text: str) -> torch.Tensor:
    """The text of config.json as uint8."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def stored_config(folder: Path) -> dict[str, Any] | None:
    """The options of the configuration that the weights in a folder contain; None if they contain none.
    Raises ConfigError if it is damaged."""
    if not any(has_file(folder / name, error=ConfigError) for name in (SINGLE, INDEX)):
        return None
    with open_checkpoint(folder) as checkpoint:
        info = checkpoint.tensors.get(CONFIG_KEY)
        if info is None or not isinstance(checkpoint, SafetensorsCheckpoint):
            return None
        if info.dtype != torch.uint8 or len(info.shape) != 1 or info.shape[0] > MOST_CONFIG:
            raise ConfigError(
                f"{info.file}: {CONFIG_KEY} must be the bytes of a config.json, and is {info.stored} "
                f"{list(info.shape)}"
            )
        data = torch.empty(info.shape, dtype=torch.uint8)
        checkpoint.read_into(CONFIG_KEY, data)
        options = parse_json(bytes(data.numpy()), info.file, error=ConfigError)
    if not isinstance(options, dict):
        raise ConfigError(f"{info.file}: {CONFIG_KEY} must hold a JSON object, and holds {options!r:.60}")
    return options


def own_rules(model: nn.Module, checkpoint: Checkpoint) -> tuple[Rule, ...]:
    """Rules for a checkpoint with minilm's own parameter names, as in ``model.state_dict()``; () for any
    other."""
    names = [name for name, _ in model.named_parameters()]
    return (
        tuple(copy(name, name) for name in names)
        if set(checkpoint.tensors) - {CONFIG_KEY} == set(names)
        else ()
    )


def stored_untied(model: Any, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint of a model with tied embeddings has a separate output matrix that differs from
    the token table.

    A copy of the table is common. A different matrix means that the configuration is wrong: the model was
    trained with it.
    """
    rules, tensors = model.family.rules(model.head_kind), checkpoint.tensors
    output = [rule.sources[0] for rule in rules if rule.transform == "tied" and rule.sources[0] in tensors]
    name = next(rule.sources[0] for rule in rules if rule.target == "body.embeddings.tokens.weight")
    table = [prefix + name for prefix in ("", *model.family.prefixes) if prefix + name in tensors]
    if not output or not table or tensors[output[0]].shape != tensors[table[0]].shape:
        return False
    values = []
    for key in (output[0], table[0]):
        values.append(torch.empty(tensors[key].shape, dtype=tensors[key].dtype))
        checkpoint.read_into(key, values[-1])
    if torch.equal(*values):
        return False
    warnings.warn(
        f"{checkpoint.path}: tie_word_embeddings is true, but {output[0]} and {table[0]} differ; both are "
        "used, as if it were false",
        stacklevel=4,
    )
    return True


def stored_format(config: Any, checkpoint: Checkpoint) -> str | None:
    """The format of a checkpoint whose matrices are quantised in one of minilm's formats; None for others."""
    named: dict[str, Any] = config.get("quantization_config", {})
    if any(info.format for info in checkpoint.tensors.values()):
        return str(named.get("format", "mixed"))
    if named:
        raise WeightError(
            f"{checkpoint.path}: config.json says that the weights are quantised ({named}), and none is"
        )
    return None


def check_format(path: Path, config: Any, found: dict[str, str] | None) -> None:
    """Compare the format in config.json with that of the tensors: a lost plane would change the latter."""
    named = config.get("quantization_config", {}).get("format")
    if named is not None and found is not None and named != found["format"]:
        raise WeightError(
            f"{path}: config.json says that the weights are quantised as {named!r}, and the tensors are "
            f"those of {found['format']!r}: the two do not belong together, or tensors are missing"
        )
