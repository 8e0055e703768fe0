"""A model of transformers and the same model in minilm, loaded from one folder with random weights.

Weights are drawn so that float32 is enough to compute with them: activations stay around one at any width,
norm weights are near one and biases are not zero, so nothing cancels and nothing can be left out unnoticed.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from strategies import ENCODERS, LIKE_ROBERTA, Batch, Config, padding_id
from torch import Tensor, nn

import minilm
from minilm.families import family_of
from minilm.families.family import Head
from minilm.model.auto import MODELS

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

LOGITS: dict[Head, tuple[str, ...]] = {
    "base": ("last_hidden_state", "pooler_output"),
    "pre-training": ("prediction_logits", "seq_relationship_logits", "sop_logits", "logits"),
    "question-answering": ("start_logits", "end_logits"),
}
"""The fields that a head answers with, where they are not just `logits`."""


def heads_of(family: str) -> tuple[Head, ...]:
    """All heads of a family, and the bare model."""
    return ("base", *family_of(family).heads)


def class_of(library: Any, family: str, head: Head) -> Any:
    """BertForMaskedLM and so on, of transformers or of minilm."""
    return getattr(library, family_of(family).class_name(head))


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter of a transformers model a random value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        leaf = name.split(".")[-2].lower()
        if name.endswith("bias"):
            values *= 0.3
        elif "norm" in leaf or leaf.startswith("ln_"):
            values = 1 + 0.6 * (torch.rand(parameter.shape, generator=generator) - 0.5)
        elif "embedding" in name or leaf in ("wte", "wpe", "embed_tokens"):
            values *= 0.5
        else:  # [out, in]; GPT-2's [in, out] differ in size only
            values *= 0.8 / math.sqrt(min(parameter.shape))
        parameter.copy_(values)


def write(config: Config, head: Head, folder: Path, seed: int, **overrides: Any) -> Any:
    """Save a random checkpoint of transformers with exactly this config.json; returns the model, in
    evaluation mode."""
    (folder / "config.json").write_text(json.dumps(config))
    hf = transformers.AutoConfig.from_pretrained(folder, **overrides)
    model = class_of(transformers, config["model_type"], head)._from_config(hf, attn_implementation="eager")
    randomise(model, seed)
    model.save_pretrained(folder)
    stored = dict(config, **({"id2label": dict(hf.id2label)} if "num_labels" in overrides else {}))
    stored |= {k: v for k, v in overrides.items() if k != "num_labels"}
    (folder / "config.json").write_text(json.dumps(stored))
    return model.eval()


def model_of(config: Config, seed: int) -> Any:
    """A random model with a score for each token, in evaluation mode."""
    head: Head = "masked-lm" if config["model_type"] in ENCODERS else "causal-lm"
    model = MODELS[head].from_config(minilm.PretrainedConfig.from_dict(config))
    randomise(model, seed)
    return model.eval()


@dataclass
class Pair:
    """The same model twice."""

    reference: Any
    model: Any
    folder: Path
    config: Config
    head: Head


@contextmanager
def pair(config: Config, head: Head, seed: int = 0, **overrides: Any) -> Iterator[Pair]:
    """Both models, in evaluation mode; the folder lives as long as the ``with`` block. `overrides`:
    num_labels, ..."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = write(config, head, folder, seed, **overrides)
        model = class_of(minilm, config["model_type"], head).from_pretrained(folder)
        yield Pair(reference, model, folder, config, head)


def arguments(config: Config, batch: Batch) -> dict[str, Tensor]:
    """What minilm is called with."""
    family = config["model_type"]
    call = {"attention_mask": batch.mask()}
    if batch.embedded:
        hidden = family_of(family).config(minilm.PretrainedConfig.from_dict(config)).table_size
        call["inputs_embeds"] = batch.vectors(hidden)
    else:
        call["input_ids"] = batch.ids(config)
    bertish = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "albert")
    if batch.with_types and family in (*bertish, "gpt2", "deberta-v2", "nomic_bert"):
        usual = 0 if family == "deberta-v2" else 2
        kinds = config["vocab_size"] if family == "gpt2" else config.get("type_vocab_size", usual)
        call["token_type_ids"] = batch.lay_out(batch.integers(0, max(kinds, 1), 1))
    if batch.with_positions:
        table = config.get("n_positions", config.get("max_position_embeddings"))
        first = first_position(config)
        call["position_ids"] = batch.lay_out(batch.integers(first, table, 2), first)
    return call


def their_arguments(config: Config, batch: Batch) -> dict[str, Tensor]:
    """What transformers is called with: the same, and the positions of the tokens in their rows.

    minilm counts a row's positions from its first token, transformers from the first column (except RoBERTa,
    which looks at the ids), so it has to be told them.
    """
    call = arguments(config, batch)
    looks_itself = config["model_type"] in LIKE_ROBERTA and not batch.embedded
    if not batch.with_positions and not looks_itself:
        call["position_ids"] = batch.positions(first_position(config))
    return call


def first_position(config: Config) -> int:
    """Row of the position table of a text's first token."""
    return padding_id(config) + 1 if config["model_type"] in LIKE_ROBERTA else 0


def pooled_where_they_look(config: Config, head: Head, batch: Batch) -> Batch:
    """The same rows, padded on the side where transformers' heads that pool one token find a real one.

    Encoders read the first column, be it padding or not. Decoders read the last token that is not the
    padding id, but the last column if they are given vectors.
    """
    if config["model_type"] in ENCODERS:
        pools = head in ("base", "next-sentence", "pre-training", "sequence-classification")
        return replace(batch, left=False) if pools else batch
    return replace(batch, left=True) if head == "sequence-classification" and batch.embedded else batch


def fields(head: Head, output: Any) -> list[str]:
    """The names of the tensors that `head` answers with."""
    return [name for name in LOGITS.get(head, ("logits",)) if output.get(name) is not None]


def rows(batch: Batch, x: Tensor) -> Tensor:
    """The tokens' part of a result [B, S, ...], row after row, the same for padding on either side."""
    assert x.shape[:2] == (len(batch.lengths), batch.columns), f"{list(x.shape)} for {batch}"
    return x[batch.mask().bool()]
