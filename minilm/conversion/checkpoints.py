"""Converts any checkpoint that minilm loads to a folder of safetensors that transformers loads too.

    convert("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2", dtype="bfloat16")

Everything is written to a hidden folder first (`minilm.files.saving`). The destination is created, or
replaced, only when all files are complete; if the process is killed, it has either the old or the new
checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from ..families import Head
from ..files import (
    CONFIG_FILES,
    SENTENCE_FILES,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    WEIGHT_FILES,
    Checkpoint,
    has_file,
    open_checkpoint,
    resolve,
    saving,
)
from ..model import PreTrainedModel, as_dtype, read_config
from ..weights import LoadReport
from .summary import classes, fitting_head, named_head, on_meta, planned


@dataclass(frozen=True)
class Conversion:
    """Result of `convert`."""

    folder: Path
    architecture: str
    """The class that loads it, by transformers' name."""
    head: Head
    dtype: torch.dtype
    parameters: int
    quantised: dict[str, int]
    """Formats, and the number of matrices in each; empty if none is quantised."""
    floating: dict[str, str]
    """Matrices that should have been quantised (names in the model), and why they could not be."""
    files: dict[str, int]
    """Names, relative to the folder, and sizes in bytes."""
    left_out: dict[str, str]
    """Tensors of the source that the model does not use, and why."""
    tokenizer: bool


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    force: bool = False,
    max_shard_size: str = "5GB",
    weights: str = "float",
) -> Conversion:
    """Write the model called `source` (a folder, a GGUF file, a name on the hub) to the folder `destination`.

    `dtype` of the weights; None keeps the source's (GGUF: float32). `force` replaces the checkpoint in a
    folder that is not empty: files that belong to a model are removed, others stay. The tokenizer's files and
    the modules of sentence-transformers are copied. A head that the source lacks is an error. `weights`: as
    in `from_pretrained`; only minilm loads a quantised folder.

    Raises ValueError (a destination that may not be overwritten), and the errors of loading and saving.
    """
    path, folder = resolve(source), Path(destination).expanduser()
    as_dtype(dtype)
    _check_destination(folder, path, force)
    model = _load(path, dtype, weights)
    report = model.load_report or LoadReport()
    ours = (*CONFIG_FILES, *TOKENIZER_FILES, *WEIGHT_FILES, *SENTENCE_FILES)
    with saving(folder, replaces=ours) as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        tokenizer = _write_tokenizer(path, temporary)
        if path.is_dir():
            _copy(path, temporary, SENTENCE_FILES)
        files = {name: (temporary / name).stat().st_size for name in _listed(temporary)}
    return Conversion(
        folder=folder,
        architecture=model.family.class_name(model.head_kind),
        head=model.head_kind,
        dtype=model.dtype,
        parameters=model.num_parameters(),
        quantised=dict(Counter(report.quantised.values())),
        floating=dict(report.floating),
        files=files,
        left_out=dict(report.skipped),
        tokenizer=tokenizer,
    )


def _check_destination(folder: Path, source: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder to write to, and this is a file")
    own = source if source.is_dir() else source.parent
    if folder.exists() and folder.resolve() == own.resolve():
        raise ValueError(f"{folder}: the destination is the folder of the source")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ValueError(
            f"{folder}: the folder is not empty; to replace the model in it, ask for --force (force=True)"
        )


def _load(path: Path, dtype: torch.dtype | str | None, weights: str) -> PreTrainedModel:
    config = read_config(path)
    with open_checkpoint(path) as checkpoint:
        head = named_head(config)
        if head is None or _initialised(on_meta(config, head), checkpoint):
            head = fitting_head(config, checkpoint)
        missing = _initialised(on_meta(config, head), checkpoint)
    if head == "base" and missing and all(name.startswith("pooler.") for name in missing):
        return classes(config)[head].from_pretrained(
            path, dtype=dtype, weights=weights, add_pooling_layer=False
        )
    if missing:
        raise ValueError(
            f"{path}: the weights of {', '.join(missing)} are missing, so there is no model to convert"
        )
    return classes(config)[head].from_pretrained(path, dtype=dtype, weights=weights)


def _initialised(model: PreTrainedModel, checkpoint: Checkpoint) -> list[str]:
    # The bias of encoder-decoders is zero where a checkpoint has none.
    known = {"head.bias"} if model.head_kind == "seq2seq-lm" else set()
    found = (entry.target for entry in planned(model, checkpoint) if entry.transform == "initialised")
    return [target for target in found if target not in known]


def _write_tokenizer(path: Path, folder: Path) -> bool:
    """Copy the source's files, or create them from a GGUF file's metadata; False if it has no tokenizer."""
    if path.is_dir() and any(has_file(path / name) for name in VOCABULARY_FILES):
        _copy(path, folder, [name for name in TOKENIZER_FILES if name not in CONFIG_FILES])
        return True
    from ..text import AutoTokenizer

    gguf = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if not gguf or gguf[0].suffix != ".gguf":
        return False
    AutoTokenizer.from_pretrained(gguf[0]).save_pretrained(folder)
    return True


def _copy(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    for name in _listed(source, patterns):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _listed(folder: Path, patterns: Sequence[str] = ("*",)) -> list[str]:
    """The files of a folder whose names, relative to it, match a pattern."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
