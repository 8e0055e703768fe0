"""Summary of a checkpoint from its headers only, without reading weights.

    summary = summarise("all-MiniLM-L6-v2")
    summary.count, summary.memory(torch.float16), summary.flops(512), summary.parameters

The model is created on the meta device, where tensors have shapes and no values, and loading is planned
(`minilm.weights.weight_map`); all numbers are computed from these, so they are those of the model that would
be loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import LARGEST, ConfigError, ModelConfig
from ..families import ENCODER_DECODERS, Head, PretrainedConfig, family_of
from ..files import MOST_CONFIG, Checkpoint, WeightError, has_file, open_checkpoint, read_json, resolve
from ..model import MODELS, PreTrainedModel, as_dtype, read_config
from ..ops import FORMATS
from ..weights import MapEntry, weight_map

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PER_TOKEN: frozenset[Head] = frozenset(
    ("masked-lm", "pre-training", "token-classification", "question-answering", "causal-lm")
)
"""Heads that compute something for every token; the others do it once per sequence."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model and where it comes from. `stored`: the dtype in the file, "" if it has
    none."""

    name: str
    shape: tuple[int, ...]
    count: int
    stored: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """Summary of a checkpoint. Counts are of parameters, sizes in bytes."""

    name: str
    path: Path
    format: str
    files: dict[str, int]
    """The weight files and their sizes."""
    given: dict[str, Any]
    """config.json, or its equivalent in a GGUF file."""
    config: PretrainedConfig
    spec: ModelConfig
    head: Head
    parameters: tuple[Parameter, ...]
    weights: tuple[MapEntry, ...]
    """How each tensor of the checkpoint is used."""
    tokenizer: str | None
    """The file of the tokenizer."""
    chat_template: bool
    linear_weights: int
    """Elements of the matrices that every token is multiplied with."""
    dtype: torch.dtype
    """Of the weights, where loading is told none."""

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(p.count for p in self.parameters)

    @property
    def class_name(self) -> str:
        """The class that loads it, by transformers' name."""
        return classes(self.config)[self.head].__name__

    def memory(self, dtype: torch.dtype) -> int:
        """Bytes of the weights in memory."""
        return self.count * dtype.itemsize

    @property
    def stored_memory(self) -> int | None:
        """Bytes of the weights in memory where matrices stay in the codes that they are stored in
        (`weights="gguf"`, or a folder that minilm quantised); None where no matrix is stored so."""
        kept = {p.name: size for p in self.parameters if (size := _kept(p)) is not None}
        if not kept:
            return None
        rest = sum(p.count for p in self.parameters if p.name not in kept)
        return sum(kept.values()) + rest * self.dtype.itemsize

    @property
    def default_memory(self) -> int:
        """Bytes of the weights in memory as `from_pretrained` loads them when it is told nothing: a GGUF file
        dequantised, a folder that minilm quantised as it is stored."""
        stored = self.stored_memory
        return self.memory(self.dtype) if stored is None or self.format == "GGUF" else stored

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the KV cache per token; 0 for encoders, which have none."""
        return 2 * self.spec.num_layers * self.spec.kv_size * dtype.itemsize if self.spec.causal else 0

    def flops(self, context: int) -> int:
        """FLOPs per token of a forward pass, for a token that attends to `context` tokens, including itself.

        A multiplication and an addition count as two. Only matrix products are counted: the linear layers,
        and in attention the scores and the weighted sum, 4 H D per visible token. This is the cost of a
        decoding step; a prompt of S tokens, or an encoder's text, costs S times as much if attention is
        computed in full. Work done once per sequence (a pooler, a classifier) is left out.
        """
        layers = range(self.spec.num_layers)
        visible = sum(min(context, self.spec.window(layer) or context) for layer in layers)
        return 2 * self.linear_weights + 4 * self.spec.q_size * visible

    def to_dict(self) -> dict[str, Any]:
        """All of it, in JSON types."""
        longest = self.spec.max_positions
        contexts = sorted({min(c, longest) for c in (1, 512, longest) if c != LARGEST})
        return {
            "name": self.name,
            "path": str(self.path),
            "format": self.format,
            "files": self.files,
            "class": self.class_name,
            "head": self.head,
            "config": self.given,
            "understood_as": asdict(self.spec),
            "parameters": self.count,
            "dtype": _name(self.dtype),
            "memory_bytes": {
                **{_name(dtype): self.memory(dtype) for dtype in DTYPES},
                "as_stored": self.stored_memory,
                "default": self.default_memory,
            },
            "kv_cache_bytes_per_token": {_name(dtype): self.kv_bytes(dtype) for dtype in DTYPES},
            "flops_per_token": {str(context): self.flops(context) for context in contexts},
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "parameter_table": [asdict(p) for p in self.parameters],
            "weight_map": [entry._asdict() for entry in self.weights],
        }


def summarise(name_or_path: str | os.PathLike[str], *, head: Head | None = None) -> Summary:
    """Summarise a folder, a GGUF file or a name on the hub (which is downloaded if necessary).

    `head`: the head to assume; by default the one that the checkpoint names, or else the one that fits its
    tensors. Raises HubError, ConfigError and WeightError like loading.
    """
    path = resolve(name_or_path)
    config = read_config(path)
    beside = path.parent if path.name.endswith((".safetensors", ".safetensors.index.json")) else path
    with open_checkpoint(path) as checkpoint:
        head = head or named_head(config) or fitting_head(config, checkpoint)
        model = on_meta(config, head)
        entries = planned(model, checkpoint)
        files = {info.file: info.file.stat().st_size for info in checkpoint.tensors.values()}
        given = _given(beside, checkpoint)
        kinds = (info.dtype for info in checkpoint.tensors.values())
        floating = next((kind for kind in kinds if kind.is_floating_point and kind.itemsize > 1), None)
    tokenizer, template = _tokenizer(beside, checkpoint)
    return Summary(
        name=str(name_or_path),
        path=path,
        format="GGUF" if any(file.suffix == ".gguf" for file in files) else "safetensors",
        files={file.name: size for file, size in files.items()},
        given=given,
        config=config,
        spec=model.spec,
        head=head,
        parameters=tuple(_parameters(model, entries)),
        weights=tuple(entries),
        tokenizer=tokenizer,
        chat_template=template,
        linear_weights=_linear_weights(model),
        dtype=as_dtype(config.dtype) or floating or torch.float32,
    )


def _kept(parameter: Parameter) -> int | None:
    """Bytes of a matrix in the codes that it is stored in; None where it is stored in numbers, or its parts
    in several formats."""
    kind = FORMATS.get(parameter.stored.lower())
    if kind is None or len(parameter.shape) != 2:
        return None
    rows, columns = parameter.shape
    scales = rows * (columns // 32 if kind.grouped else 1)
    return rows * columns // kind.per_byte + scales * kind.scale.itemsize * (1 + kind.minimum)


def named_head(config: PretrainedConfig) -> Head | None:
    """The head that the configuration's `architectures` name; None if minilm does not have it."""
    family = family_of(config.model_type)
    for name in config.get("architectures") or ():
        for head in classes(config):
            if (head == "base" or head in family.heads) and name == family.class_name(head):
                return head
    return None


def fitting_head(config: PretrainedConfig, checkpoint: Checkpoint) -> Head:
    """The head that the checkpoint fits best: fewest missing weights, then fewest unused ones.

    Raises WeightError if the tensors do not fit the family with any head.
    """
    best: tuple[int, int, Head] | None = None
    failure: WeightError | None = None
    for head in classes(config):
        if head != "base" and head not in family_of(config.model_type).heads:
            continue
        try:
            entries = planned(on_meta(config, head), checkpoint)
        except WeightError as error:
            failure = failure or error
            continue
        initialised = sum(entry.transform == "initialised" for entry in entries)
        left = sum(not entry.target for entry in entries)
        if best is None or (initialised, left) < best[:2]:
            best = (initialised, left, head)
    if best is None:
        raise failure or ConfigError(f"{config.model_type} models have no head")
    return best[2]


def on_meta(config: PretrainedConfig, head: Head, **options: Any) -> PreTrainedModel:
    """The model on the meta device: shapes without values."""
    with torch.device("meta"):
        return classes(config)[head](config, **options)


def classes(config: PretrainedConfig) -> dict[Head, type[PreTrainedModel]]:
    """Heads -> the classes that load them; for encoder-decoders those that write texts come first."""
    if config.model_type not in ENCODER_DECODERS:
        return MODELS
    from ..seq2seq import AutoModelForSeq2SeqLM, class_of

    found: dict[Head, type[PreTrainedModel]] = {"seq2seq-lm": AutoModelForSeq2SeqLM, **MODELS}
    if "encoder" in family_of(config.model_type).heads:
        found["encoder"] = class_of("encoder", config.model_type)
    return found


def planned(model: PreTrainedModel, checkpoint: Checkpoint) -> list[MapEntry]:
    """`weight_map` of a model of one of the families."""
    return weight_map(model, checkpoint, model.family.rules(model.head_kind), model.family.prefixes)


def _given(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    from ..files import GGUFCheckpoint

    if isinstance(checkpoint, GGUFCheckpoint) and not has_file(path / "config.json", error=ConfigError):
        return checkpoint.hf_config()
    return read_json(path / "config.json", limit=MOST_CONFIG, error=ConfigError)


def _parameters(model: PreTrainedModel, entries: Iterable[MapEntry]) -> Iterable[Parameter]:
    sources: dict[str, list[MapEntry]] = {}
    for entry in entries:
        if entry.target and entry.source:
            sources.setdefault(entry.target, []).append(entry)
    for name, parameter in model.named_parameters():
        found = sources.get(name, [])
        stored = ", ".join(dict.fromkeys(entry.dtype for entry in found))
        yield Parameter(
            name, tuple(parameter.shape), parameter.numel(), stored, tuple(entry.source for entry in found)
        )


def _linear_weights(model: PreTrainedModel) -> int:
    """Elements of all matrices that each token is multiplied with, including a tied output matrix."""
    per_sequence = "head.next_sentence."
    total = 0
    for name, module in model.named_modules(remove_duplicate=False):  # ALBERT runs one block several times
        in_head = name.startswith("head.") and model.head_kind in PER_TOKEN
        if isinstance(module, nn.Linear) and (name.startswith("body.") or in_head):
            total += 0 if f"{name}.".startswith(per_sequence) else math.prod(module.weight.shape)
    if model.head_kind in ("masked-lm", "pre-training", "causal-lm") and model.spec.tie_word_embeddings:
        total += model.body.embeddings.tokens.weight.numel()
    return total


def _tokenizer(path: Path, checkpoint: Checkpoint) -> tuple[str | None, bool]:
    from ..files import VOCABULARY_FILES, GGUFCheckpoint

    folder = path if path.is_dir() else None
    names = [name for name in VOCABULARY_FILES if folder is not None and has_file(folder / name)]
    if not names and isinstance(checkpoint, GGUFCheckpoint):
        has = "tokenizer.ggml.tokens" in checkpoint.metadata
        return ("in the GGUF file" if has else None), "tokenizer.chat_template" in checkpoint.metadata
    template = False
    if folder is not None:
        template = has_file(folder / "chat_template.jinja") or any(folder.glob("chat_templates/*.jinja"))
        settings = folder / "tokenizer_config.json"
        if not template and has_file(settings):
            template = bool(read_json(settings, error=ConfigError).get("chat_template"))
    return (names[0] if names else None), template


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
