"""The two real models against recorded answers of the reference implementations (tools/make_golden.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minilm import LLM, SamplingParams, SentenceEncoder

GOLDEN = Path(__file__).parent / "golden"


def test_minilm_embeddings_are_those_of_sentence_transformers() -> None:
    data = json.loads((GOLDEN / "all-MiniLM-L6-v2.json").read_text(encoding="utf-8"))
    ours = SentenceEncoder(data["model"]).encode([case["text"] for case in data["cases"]])
    expected = np.array([case["embedding"] for case in data["cases"]])
    assert len(expected) >= 8
    assert np.abs(ours - expected).max() <= 1e-5


@pytest.mark.slow
def test_smollm2_writes_the_greedy_tokens_of_transformers() -> None:
    data = json.loads((GOLDEN / "SmolLM2-135M-Instruct.json").read_text(encoding="utf-8"))
    llm = LLM(data["model"])
    prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in data["cases"]]
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    for case, output in zip(data["cases"], llm.generate(prompts, params, use_tqdm=False), strict=True):
        assert llm.tokenizer(case["prompt"])["input_ids"] == case["prompt_token_ids"]
        assert output.outputs[0].token_ids == case["token_ids"], case["prompt"]
