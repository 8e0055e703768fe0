"""Opens a checkpoint of any supported format.

Pickled checkpoints (`pytorch_model.bin`) are never read: unpickling a file runs the code in it.
"""

from __future__ import annotations

from pathlib import Path

from .checkpoint import Checkpoint, WeightError
from .gguf import GGUFCheckpoint
from .quantized import QuantizedCheckpoint
from .reading import has_file
from .safetensors import INDEX, SINGLE, SafetensorsCheckpoint
from .saving import settle

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the weights at `path`: a .safetensors or .gguf file, an index of shards, or a folder with one of
    them (`model.safetensors`, else `model.safetensors.index.json`, else its only .gguf file). Each matrix
    that minilm saved quantised appears as one tensor."""
    path = Path(path)
    if path.is_dir():
        settle(path)
        path = _find(path)
    elif not has_file(path, error=WeightError):
        raise WeightError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        plain = SafetensorsCheckpoint(path)
        if any(name.endswith(".weight.codes") for name in plain.tensors):
            return QuantizedCheckpoint(plain)
        return plain
    if path.suffix in _PICKLED:
        raise WeightError(_no_pickle(path))
    raise WeightError(f"{path}: expected a .safetensors, .safetensors.index.json or .gguf file")


def _find(folder: Path) -> Path:
    for name in (SINGLE, INDEX):
        if has_file(folder / name, error=WeightError):
            return folder / name
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise WeightError(f"{folder}: has {len(ggufs)} GGUF files, name one of them: {names}")
    pickled = sorted(file for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise WeightError(_no_pickle(pickled[0]))
    there = sorted(file.name for file in folder.iterdir())
    more = f" and {len(there) - 6} more" if len(there) > 6 else ""
    holds = f"it holds {', '.join(there[:6])}{more}" if there else "it is empty"
    raise WeightError(f"{folder}: no weights here: expected {SINGLE}, {INDEX} or a .gguf file, and {holds}")


def _no_pickle(path: Path) -> str:
    return (
        f"{path}: this is a pickle, and unpickling runs the code in it, so minilm never reads one; "
        "convert it where you trust it: transformers.AutoModel.from_pretrained(folder).save_pretrained(new)"
    )
