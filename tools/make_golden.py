"""Records outputs of the reference implementations for the two small pretrained models, for tests and the
demo.

    make test && .venv/bin/python tools/make_golden.py

Writes tests/golden/all-MiniLM-L6-v2.json (embeddings by sentence-transformers) and
tests/golden/SmolLM2-135M-Instruct.json (greedy tokens by transformers, with the dequantised weights).
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minilm.files.hub import DEFAULT_DECODER, DEFAULT_ENCODER, resolve

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"

SENTENCES = [
    "A man is eating food.",
    "Jemand isst zu Mittag; naïve cafés, größer als 10 °C.",
    "東京は日本の首都です。",
    "",
    "UPPER CASE and lower case are the same to this model",
    "😀 emoji, \t tabs and\nnew lines",
    "x",
    " ".join(f"word{i % 37} sentence" for i in range(200)),
]
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "1, 2, 3, 4,"]
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
NEW_TOKENS = 64


def write(model: str, libraries: list[str], cases: list[dict[str, Any]]) -> None:
    """Write one file: how it was made, and the cases."""
    versions = {name: version(name) for name in (*libraries, "torch")}
    data = {
        "made_by": "tools/make_golden.py",
        "versions": {"python": platform.python_version(), **versions},
        "model": model,
        "cases": cases,
    }
    GOLDEN.mkdir(exist_ok=True)
    path = GOLDEN / f"{model}.json"
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{path.relative_to(GOLDEN.parent.parent)}: {len(cases)} cases")


def embeddings() -> None:
    """all-MiniLM-L6-v2 by sentence-transformers; numbers with 7 significant digits."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(resolve(DEFAULT_ENCODER)), device="cpu")
    vectors = model.encode(SENTENCES)
    cases = [
        {"text": text, "embedding": [float(f"{x:.7g}") for x in vector.tolist()]}
        for text, vector in zip(SENTENCES, vectors, strict=True)
    ]
    write(DEFAULT_ENCODER, ["sentence-transformers", "transformers"], cases)


def greedy_tokens() -> None:
    """SmolLM2-135M-Instruct by transformers' Llama in float32, dequantised by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from minilm import AutoTokenizer

    path = resolve(DEFAULT_DECODER)
    config = LlamaConfig(**load_gguf_checkpoint(str(path))["config"])
    model = LlamaForCausalLM(config).eval()
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    result = model.load_state_dict({k: torch.as_tensor(v).float() for k, v in tensors.items()}, strict=False)
    if result.unexpected_keys or set(result.missing_keys) - {"lm_head.weight"}:
        raise SystemExit(f"the checkpoint does not fit: {result}")
    model.tie_weights()
    model.generation_config.eos_token_id = None  # a chat answer may end early; the continued numbers do not
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_DECODER)
    chat = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    cases = []
    for prompt in [*PROMPTS, chat]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(
            ids
        )  # otherwise generate masks the padding token, which also ends turns of the chat
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)
        tokens = out[0, ids.shape[1] :].tolist()
        cases.append({"prompt": prompt, "prompt_token_ids": ids[0].tolist(), "token_ids": tokens})
    write(DEFAULT_DECODER, ["transformers", "gguf"], cases)


if __name__ == "__main__":
    embeddings()
    greedy_tokens()
