"""Small random checkpoints with small real tokenizers, as transformers saves them.

The weights are spread out, so that scores differ clearly and a mistake shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

_LISTED = """ the a of in is was lives works city france paris berlin london john smith mary anna who where
what when does live company river green tea house red book old man ##s ##ed ##ing ##er ##land ##town un
"""
WORDS = _LISTED.split()
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789éüñ北京"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MPNETS = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
CORPUS = [
    "John Smith lives in Paris, the old city of France.",
    "Mary works in London; Anna was in Berlin. Where does Anna live?",
    "The green tea house: who is the man in the red book?",
    "Éric drinks tea in Nürnberg, 北京 and Washington (D.C.).",
]

TEXTS = [
    "John Smith lives in Paris.",
    "anna",
    "Éric was in 北京 and Nürnberg, where Mary Smithers works; who is unhappy? 😀 the end",
    "the old man of the river lives in the green house in Greenland, in the city of Parisland" * 2,
    "London",
]
"""Of mixed lengths, with characters outside ASCII and outside the vocabularies; 2 to about 60 tokens."""


def _bert_vocabulary(folder: Path, special: list[str]) -> Path:
    continued = [f"##{letter}" for letter in LETTERS]
    vocabulary = [*special, *WORDS, *LETTERS, *continued, *".,;:?!'()-"]
    file = folder / "vocab.txt"
    file.write_text("\n".join(dict.fromkeys(vocabulary)), encoding="utf-8")
    return file


def save_tokenizer(folder: Path, family: str, model_max_length: int) -> Any:
    """Write the tokenizer of a family; returns transformers' tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    if family == "roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(CORPUS * 3, vocab_size=330, min_frequency=2, special_tokens=special)
        trained.save_model(str(folder))
    else:
        _bert_vocabulary(folder, MPNETS if family == "mpnet" else SPECIAL)
    cls = {
        "bert": transformers.BertTokenizerFast,
        "distilbert": transformers.DistilBertTokenizerFast,
        "roberta": transformers.RobertaTokenizerFast,
        "mpnet": transformers.MPNetTokenizer,
        "electra": transformers.ElectraTokenizer,
    }[family]
    tokenizer = cls.from_pretrained(str(folder), model_max_length=model_max_length)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def save_model(
    folder: Path,
    family: str,
    head: str = "Model",
    *,
    positions: int = 64,
    seed: int = 0,
    spread: float = 0.3,
    **options: Any,
) -> Path:
    """A tiny random model with a head (a class name's end, `ForMaskedLM`) and its tokenizer, in `folder`."""
    tokenizer = save_tokenizer(folder, family, positions)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer)}
    if family == "distilbert":
        sizes.update(dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_position_embeddings=positions)
        config: Any = transformers.DistilBertConfig(**{**sizes, **options})
    else:
        sizes.update(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
        offset = 2 if family in ("roberta", "mpnet") else 0
        sizes.update(max_position_embeddings=positions + offset)
        sizes.update({"embedding_size": 10} if family == "electra" else {})
        config = {
            "bert": transformers.BertConfig,
            "roberta": transformers.RobertaConfig,
            "mpnet": transformers.MPNetConfig,
            "electra": transformers.ElectraConfig,
        }[family](**{**sizes, **options})
    if family == "roberta":
        config.pad_token_id, config.bos_token_id, config.eos_token_id = 1, 0, 2
    prefixes = {"bert": "Bert", "distilbert": "DistilBert", "mpnet": "MPNet", "electra": "Electra"}
    prefix = prefixes.get(family, "Roberta")
    if family == "electra":  # rounding would grow, and seeds below 12 know few classes
        seed, spread = seed + 12, spread * 0.6
    torch.manual_seed(seed)
    model = getattr(transformers, prefix + head)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = "embeddings" in name or name.startswith(("classifier", "qa_outputs", "pre_classifier"))
            if family in ("mpnet", "electra"):
                wide &= not name.endswith(("classifier.dense.weight", "embeddings_project.weight"))
            parameter.normal_(0.0, 0.1 if name.endswith("bias") else 1.0 if wide else spread)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
    model.save_pretrained(str(folder))
    return folder


CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if not loop.last or add_generation_prompt %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_decoder(
    folder: Path, family: str, *, positions: int = 96, seed: int = 0, chat: bool = True, **generation: Any
) -> Path:
    """A tiny random GPT-2 or Llama with a byte-level tokenizer; `generation`: its defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        CORPUS * 3, vocab_size=300, min_frequency=2, special_tokens=["<|end|>", "<|pad|>"]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(str(folder))
    common = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    if family == "gpt2":
        config: Any = transformers.GPT2Config(n_positions=positions, n_embd=24, n_layer=2, n_head=3, **common)
        model: Any = transformers.GPT2LMHeadModel
    else:
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
        config = transformers.LlamaConfig(
            max_position_embeddings=positions, num_key_value_heads=1, **sizes, **common
        )
        model = transformers.LlamaForCausalLM
    torch.manual_seed(seed)
    model = model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.5)
            if "ln" in name or "norm" in name:
                parameter.add_(1.0)
    model.generation_config.update(**generation)
    model.save_pretrained(str(folder))
    return folder
