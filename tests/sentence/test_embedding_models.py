"""Sentence models of newer kinds against sentence-transformers: folders like those of Qwen3-Embedding,
EmbeddingGemma and ModernBERT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_models import CORPUS, SPECIAL, TEXTS
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors

import minilm
from minilm.files import FileError
from minilm.sentence import SentenceEncoder

PROMPTS = {"query": "Instruct: find what answers\nQuery: ", "document": "title: none | text: "}


def tokenizer_of(folder: Path, before: str | None, after: str, side: str) -> Any:
    """A byte-level tokenizer whose post-processor puts special tokens around a text."""
    trained = ByteLevelBPETokenizer()
    special = [*SPECIAL, "<bos>", "<|endoftext|>"]
    trained.train_from_iterator(CORPUS * 3, vocab_size=340, min_frequency=2, special_tokens=special)
    backend: Tokenizer = trained._tokenizer
    framed = ([f"{before}"] if before else []) + ["$A", after]
    around = [(token, backend.token_to_id(token)) for token in (before, after) if token]
    frame = processors.TemplateProcessing(single=framed, pair=[*framed, "$B:1"], special_tokens=around)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), frame])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    tokenizer.padding_side = side
    tokenizer.model_max_length = 50
    tokenizer.save_pretrained(str(folder))
    return tokenizer


SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}


def build(folder: Path, kind: str) -> Path:
    """A random model of sentence-transformers in `folder`, with prompts."""
    backbone = folder / "backbone"
    around: dict[str, tuple[str | None, str, str]] = {
        "qwen3": (None, "<|endoftext|>", "left"),
        "gemma3_text": ("<bos>", "<|endoftext|>", "right"),
        "modernbert": ("[CLS]", "[SEP]", "right"),
    }
    tokenizer = tokenizer_of(backbone, *around[kind])
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0, **SIZES}
    decoder = {"num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 5, "eos_token_id": 6}
    options: dict[str, dict[str, Any]] = {
        "qwen3": {**decoder, "use_cache": False},
        "gemma3_text": {**decoder, "use_bidirectional_attention": True, "sliding_window": 9},
        "modernbert": {"local_attention": 10, "cls_token_id": 2, "sep_token_id": 3},
    }
    config = transformers.AutoConfig.for_model(kind, **common, **options[kind])
    torch.manual_seed(1)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and kind != "gemma3_text" else 0.0, 0.3)
    model.save_pretrained(str(backbone))
    first = Transformer(str(backbone))
    modes = {"qwen3": "lasttoken", "gemma3_text": "mean", "modernbert": "cls"}
    rest: list[Any] = [Pooling(24, modes[kind])]
    if kind == "gemma3_text":
        identity = torch.nn.Identity()
        rest += [Dense(24, 31, bias=False, activation_function=identity)]
        rest += [Dense(31, 24, bias=False, activation_function=identity)]
    made = SentenceTransformer(modules=[first, *rest, Normalize()], device="cpu", prompts=PROMPTS)
    made.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


@pytest.mark.filterwarnings("ignore:1 of . texts have more than:UserWarning")
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "modernbert"])
def test_embeddings(tmp_path: Path, kind: str) -> None:
    """Of texts, queries and documents; a long text keeps its end token; saved, both read the same again."""
    folder = build(tmp_path, kind)
    theirs, ours = SentenceTransformer(str(folder), device="cpu"), SentenceEncoder(folder, device="cpu")
    ends = {"qwen3": 6, "gemma3_text": 6, "modernbert": 3}
    assert all(tokens.ids[-1] == ends[kind] for tokens in ours.transformer.tokenise(TEXTS)[0])
    for name in ("encode", "encode_query", "encode_document"):
        expected = getattr(theirs, name)(TEXTS)
        np.testing.assert_allclose(getattr(ours, name)(TEXTS, 2), expected, atol=1e-5, err_msg=name)
    assert np.abs(theirs.encode_query(TEXTS) - theirs.encode(TEXTS)).max() > 1e-2
    ours.save_pretrained(tmp_path / "again")
    for again in (SentenceTransformer, SentenceEncoder):
        model: Any = again(str(tmp_path / "again"), device="cpu")
        np.testing.assert_allclose(model.encode_document(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_decoder_without_modules(tmp_path: Path, causal: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The last token, or the mean if tokens see later ones; as in sentence-transformers, with a log line."""
    folder = build(tmp_path, "qwen3").parent / "backbone"
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], **({} if causal else {"is_causal": False})}
    (folder / "config.json").write_text(json.dumps(config))
    theirs, ours = SentenceTransformer(str(folder), device="cpu"), SentenceEncoder(folder, device="cpu")
    assert f"has no modules.json: using {'lasttoken' if causal else 'mean'} pooling" in caplog.text
    np.testing.assert_allclose(ours.encode(TEXTS[:2]), theirs.encode(TEXTS[:2]), atol=1e-5)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3Model"]}))
    if causal:
        with pytest.raises(FileError, match="a Qwen3Model whose tokens see only earlier ones may be pooled"):
            SentenceEncoder(folder)


def test_later_tokens_count(tmp_path: Path) -> None:
    """In EmbeddingGemma and in no causal model; which then refuses to generate."""
    changed = {}
    for kind in ("qwen3", "gemma3_text"):
        model = minilm.AutoModel.from_pretrained(build(tmp_path / kind, kind))
        ids = torch.tensor([[7, 8, 9, 10], [7, 8, 9, 11]])
        with torch.no_grad():
            first, second = model(ids).last_hidden_state[:, 0]
        changed[kind] = float((first - second).abs().max())
        if kind == "gemma3_text":
            with pytest.raises(ValueError, match="tokens of this gemma3_text model see later ones"):
                model.new_cache(1)
    assert changed["qwen3"] == 0
    assert changed["gemma3_text"] > 1e-3
