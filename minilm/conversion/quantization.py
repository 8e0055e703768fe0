"""Converts any checkpoint that minilm loads to a folder of quantised weights, and measures the loss of
quality.

done = quantize("SmolLM2-135M-Instruct", "smollm2-q4", weights="q4")
done.before, done.after, done.error
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..evaluation import Likeness, likeness, perplexity
from ..families import family_of
from ..files import open_checkpoint, resolve
from ..model import AutoModelForCausalLM, read_config
from ..sentence import SentenceEncoder
from ..text import AutoTokenizer
from .checkpoints import Conversion, convert

TEXTS, TOKENS, WINDOW = 256, 2048, 512
"""Number of texts (from Python's documentation) to evaluate an encoder, of tokens for a decoder, and its
window."""


@dataclass(frozen=True)
class Perplexities:
    """Perplexity of a decoder in float32 and quantised, on the same text."""

    floating: float
    quantised: float
    tokens: int


@dataclass(frozen=True)
class Quantization:
    """Result of `quantize`: the written files, and the measured error."""

    conversion: Conversion
    before: int
    """Bytes of the weight files of the source."""
    after: int
    error: Perplexities | Likeness | None
    """Compared with the source in float32: a decoder's perplexity, or vectors of texts; None if there is no
    tokenizer, and for encoder-decoders without an encoder alone."""


def quantize(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    weights: str = "q4",
    dtype: torch.dtype | str | None = None,
    texts: Sequence[str] | None = None,
    tokens: int = TOKENS,
    force: bool = False,
    max_shard_size: str = "5GB",
) -> Quantization:
    """Write the model called `source` with quantised weights to the folder `destination`.

    `weights`: as in `from_pretrained`. `dtype`: of the unquantised weights. `texts`: texts for measuring the
    error (for a decoder: the first `tokens` tokens of all together); None: documentation that comes with
    Python. Other options and errors as in `convert`.
    """
    texts = shipped_texts() if texts is None else texts
    path, folder = resolve(source), Path(destination).expanduser()
    done = convert(path, folder, dtype=dtype, force=force, max_shard_size=max_shard_size, weights=weights)
    error: Perplexities | Likeness | None = None
    writes = done.head == "seq2seq-lm" and "encoder" not in family_of(read_config(path).model_type).heads
    if done.tokenizer and not writes:
        causal = done.head == "causal-lm"
        error = _perplexities(path, folder, texts, tokens) if causal else _likeness(path, folder, texts)
    return Quantization(done, _weight_bytes(path), _weight_bytes(folder), error)


def _weight_bytes(path: Path) -> int:
    with open_checkpoint(path) as checkpoint:
        return sum(file.stat().st_size for file in {info.file for info in checkpoint.tensors.values()})


def _perplexities(source: Path, folder: Path, texts: Sequence[str], tokens: int) -> Perplexities:
    """One model after the other, so that only one is in memory."""
    ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(texts), verbose=False)["input_ids"][:tokens]
    found = []
    for path, weights in ((source, "float"), (folder, None)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, weights=weights)
        window = min(WINDOW, model.spec.max_positions)
        found.append(perplexity(model, ids, window))
        del model
    return Perplexities(found[0], found[1], len(ids))


def _likeness(source: Path, folder: Path, texts: Sequence[str]) -> Likeness:
    log = logging.getLogger("minilm.sentence.files")  # a model without pooling settings needs no warning here
    level = log.level
    log.setLevel(logging.ERROR)
    found = []
    try:
        for path, weights in ((source, "float"), (folder, None)):
            encoder = SentenceEncoder(path, device="cpu", dtype=torch.float32, weights=weights)
            found.append(encoder.encode(list(texts), convert_to_tensor=True, show_progress_bar=False))
            del encoder
    finally:
        log.setLevel(level)
    return likeness(found[1], found[0])


def shipped_texts(count: int = TEXTS) -> list[str]:
    """Paragraphs of Python's own documentation, from the module with the topics of `help()`.

    Raises ValueError if this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "this Python comes without documentation texts (pydoc_data): give texts with --texts"
        ) from error
    paragraphs = (" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n"))
    texts = (text for text in paragraphs if text[:1].isupper() and 8 <= len(text.split()) <= 100)
    return list(dict.fromkeys(texts))[:count]
