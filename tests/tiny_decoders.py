"""Small random decoders of each family with a small real tokenizer, saved by transformers, loaded by both
libraries.

The weights are so spread out that the best token leads by far: then float32 rounding never decides, and
texts of both libraries can be compared token by token.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

import minilm

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "phi3")
BOS, EOS, PAD = 0, 1, 2
VOCABULARY = 331
WINDOW = 160

CORPUS = [
    "The cat sat on the mat, and the dog sat on the cat. Stop! What a day.",
    "In the year 1984 the clocks were striking thirteen; nobody was surprised.",
    "Ünïcödé naïve café — 北京欢迎你 — здравствуй, мир! 😀 🎉 once upon a time",
    "User: what is this?\nAssistant: this is a test.\n### the end\n",
]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": WINDOW},
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 9},
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 16},
    "phi3": {**SIZES, "sliding_window": 9},
    "smollm3": {**SIZES, "no_rope_layer_interval": 2},
    "olmo2": SIZES,
    "gpt_neox": {**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, "rotary_pct": 0.5},
    "phi": SIZES,
    "gemma": {**SIZES, "head_dim": 16},
    "gemma2": {**SIZES, "head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**SIZES, "head_dim": 16, "sliding_window": 9, "sliding_window_pattern": 2},
}


@dataclass
class Decoder:
    """The same decoder twice, and its tokenizer twice."""

    folder: Path
    theirs: Any
    ours: Any
    their_tokenizer: Any
    tokenizer: Any


@functools.cache
def _home() -> Any:
    return tempfile.TemporaryDirectory(prefix="tiny_decoders")


@functools.cache
def decoder(family: str, **options: Any) -> Decoder:
    """A random model; `options` are of its configuration. Made once, so that tests must not change it."""
    folder = Path(_home().name) / "-".join([family, *(f"{k}={v}" for k, v in options.items())])
    save_tokenizer(folder)
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCABULARY, initializer_range=0.4, **{**CONFIGS[family], **special, **options}
    )
    torch.manual_seed(len(family))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(folder)
    ours = minilm.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return Decoder(folder, theirs, ours, their_tokenizer, minilm.AutoTokenizer.from_pretrained(folder))


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
    trained.train_from_iterator(CORPUS * 4, vocab_size=VOCABULARY, min_frequency=2, special_tokens=special)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT,
    ).save_pretrained(folder)


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random tokens without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def batch(rows: list[list[int]], *, left: bool = True) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of rows padded to one length."""
    width = max(map(len, rows))
    gaps = [[PAD] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for gap, row in zip(gaps, rows, strict=True)]
    mask = [[0] * len(gap) + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
    mask = mask if left else [m[::-1] for m in mask]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
