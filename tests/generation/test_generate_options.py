"""Where the options of `generate` come from, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_decoders import EOS, VOCABULARY, WINDOW, decoder, prompts

import minilm
from minilm.generation import TextStreamer
from minilm.generation.config import GenerationConfig


def test_the_checkpoint_then_the_config_then_the_call(tmp_path: Path) -> None:
    d = decoder("llama")
    model = minilm.AutoModelForCausalLM.from_pretrained(d.folder)
    prompt = torch.tensor(prompts([5]))
    assert model.generation_config.eos_token_id == EOS
    model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=None)
    assert model.generate(prompt).shape[1] == 8
    assert model.generate(prompt, generation_config=GenerationConfig(max_new_tokens=4)).shape[1] == 9
    assert model.generate(prompt, GenerationConfig(max_new_tokens=4), max_new_tokens=6).shape[1] == 11
    model.generation_config = GenerationConfig(max_length=10**6)
    assert model.generate(prompt).shape[1] == WINDOW, "what a checkpoint asks for is cut to the window"
    model.generation_config = GenerationConfig(
        do_sample=True, seed=5, temperature=1.5, top_k=3, max_new_tokens=9
    )
    expected = d.ours.generate(prompt, do_sample=True, seed=5, temperature=1.5, top_k=3, max_new_tokens=9)
    model.save_pretrained(tmp_path)
    loaded = minilm.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config == model.generation_config
    assert torch.equal(loaded.generate(prompt, eos_token_id=EOS), expected)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.temperature, theirs.top_k, theirs.max_new_tokens) == (1.5, 3, 9)
    assert GenerationConfig.from_pretrained(tmp_path, top_k=4).top_k == 4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_made_of_a_config_has_its_special_tokens_in_a_generation_config(
    family: str, tmp_path: Path
) -> None:
    config = minilm.PretrainedConfig.from_dict(decoder(family).ours.config.to_dict())
    config.eos_token_id, config.bos_token_id, config.pad_token_id = 5, 6, 7
    model = minilm.AutoModelForCausalLM.from_config(config)
    reference = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config.to_dict())
    )
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "max_new_tokens", "do_sample"):
        assert getattr(model.generation_config, name) == getattr(reference.generation_config, name)
    assert model.generation_config.eos_token_id == 5
    model.save_pretrained(tmp_path)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == 5


def test_a_model_without_generation_config_takes_the_special_tokens_of_its_config() -> None:
    model = minilm.AutoModelForCausalLM.from_config(decoder("gpt2").ours.config)
    model.generation_config = None
    assert model.generate(torch.tensor([[4, 5]]), max_new_tokens=3).shape[1] <= 5


@given(
    st.dictionaries(
        st.sampled_from(["max_length", "top_k", "eos_token_id", "chat_format"]), st.integers(1, 9)
    ),
    st.dictionaries(st.sampled_from(["temperature", "min_p"]), st.floats(0.1, 1)),
)
def test_generation_configs_survive_their_file(whole: dict[str, int], parts: dict[str, float]) -> None:
    config = GenerationConfig(**whole, **parts)
    stored = json.loads(config.to_json_string())
    stored.pop("minilm_version")
    assert stored == {**whole, **parts}
    assert GenerationConfig(**stored) == config
    assert config.top_p is None
    assert config.update(top_p=0.5, nonsense=1) == {"nonsense": 1}
    assert config.top_p == 0.5


# What it refuses


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be a whole number from 1.*0"),
        ({"num_beams": 2.5}, ValueError, "num_beams must be.*2.5"),
        ({"num_beams": True}, ValueError, "num_beams must be.*True"),
        ({"num_beams": 3, "num_return_sequences": 4}, ValueError, "num_return_sequences=4.*num_beams=3"),
        ({"num_beams": 3, "early_stopping": "soon"}, ValueError, "early_stopping must be.*'soon'"),
        ({"num_beams": 3, "early_stopping": 1}, ValueError, "early_stopping must be.*1"),
        ({"num_beams": 3, "length_penalty": math.nan}, ValueError, "length_penalty must be.*nan"),
        ({"num_beams": 3, "length_penalty": "1"}, ValueError, "length_penalty must be.*'1'"),
        ({"num_beams": 3, "length_penalty": 999.0}, ValueError, "length_penalty=999.0.*20 tokens"),
        ({"num_beams": 3, "length_penalty": -999}, ValueError, "length_penalty=-999.*20 tokens"),
        ({"num_beams": 3, "streamer": TextStreamer(None)}, ValueError, "streamer.*num_beams is 3"),
        ({"num_beams": 3, "past_key_values": ()}, ValueError, "past_key_values.*num_beams is 3"),
        ({"num_beam_groups": 3}, ValueError, "num_beam_groups=3.*transformers.*moved"),
        ({"constraints": [3]}, ValueError, "constraints.*prefix_allowed_tokens_fn"),
        ({"prompt_lookup_num_tokens": 3}, ValueError, "prompt_lookup_num_tokens=3.*speed"),
        ({"guidance_scale": 1.5}, ValueError, "guidance_scale=1.5.*logits_processor"),
        ({"penalty_alpha": 0.6}, ValueError, "penalty_alpha"),
        ({"bad_words_ids": []}, ValueError, "bad_words_ids must be a non-empty list"),
        ({"bad_words_ids": [[3], []]}, ValueError, r"bad_words_ids must hold.*holds \[\]"),
        ({"bad_words_ids": [[-3]]}, ValueError, r"bad_words_ids must hold.*holds \[-3\]"),
        ({"bad_words_ids": [[VOCABULARY]]}, ValueError, f"bad_words_ids holds token {VOCABULARY}"),
        ({"bad_words_ids": ["word"]}, ValueError, "bad_words_ids must hold.*'word'"),
        ({"sequence_bias": {(3,): math.nan}}, ValueError, "sequence_bias must be.*nan"),
        ({"sequence_bias": {3: 1.0}}, ValueError, "sequence_bias must hold.*3"),
        ({"encoder_repetition_penalty": 0.0}, ValueError, "encoder_repetition_penalty must be.*0.0"),
        ({"encoder_no_repeat_ngram_size": -1}, ValueError, "encoder_no_repeat_ngram_size must be.*-1"),
        ({"exponential_decay_length_penalty": 3}, ValueError, "must be .start, factor., and is 3"),
        ({"exponential_decay_length_penalty": (3, 1.1), "eos_token_id": []}, ValueError, "an eos_token_id"),
        ({"suppress_tokens": "no"}, ValueError, "suppress_tokens must be token ids.*'no'"),
        ({"do_sample": True, "typical_p": 0.0}, ValueError, "typical_p must be.*0.0"),
        ({"do_sample": True, "top_h": 1.1}, ValueError, "top_h must be.*1.1"),
        ({"do_sample": True, "eta_cutoff": 1.0}, ValueError, "eta_cutoff must be.*1.0"),
        ({"do_sample": True, "epsilon_cutoff": -1.0}, ValueError, "epsilon_cutoff must be.*-1.0"),
        ({"assistant_model": object()}, ValueError, "assistant_model"),
        ({"logits_processor": [print]}, ValueError, "logits_processor"),
        ({"max_new_tokns": 4}, TypeError, "max_new_tokns"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number from 1, and is 0"),
        ({"max_new_tokens": "9"}, ValueError, "max_new_tokens must be.*'9'"),
        ({"eos_token_id": ["</s>"]}, ValueError, "eos_token_id must be token ids"),
        ({"pad_token_id": 1.5}, ValueError, "pad_token_id must be token ids"),
        ({"do_sample": True, "temperature": "hot"}, ValueError, "temperature must be a number.*'hot'"),
        ({"do_sample": True, "seed": "x"}, ValueError, "seed must be"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "a seed or a generator"),
        ({"max_length": 3}, ValueError, "3 columns.*max_length=3"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences=2 needs do_sample"),
        ({"do_sample": True, "num_return_sequences": 0}, ValueError, "num_return_sequences must be.*0"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature must be"),
        ({"do_sample": True, "top_p": 1.5}, ValueError, "top_p must be.*1.5"),
        ({"repetition_penalty": -1.0}, ValueError, "repetition_penalty must be"),
        ({"stop_strings": ["x"]}, ValueError, "tokenizer"),
        ({"attention_mask": torch.ones(1, 4)}, ValueError, r"attention_mask must be.*\[1, 3\].*\[1, 4\]"),
        ({"attention_mask": torch.zeros(1, 3)}, ValueError, "row 0 is empty"),
        ({"input_ids": torch.tensor([[1]])}, ValueError, "inputs and input_ids"),
        ({"past_key_values": ()}, ValueError, "KVCache"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_name_what_is_wrong(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        decoder("llama").ours.generate(torch.tensor([[5, 6, 7]]), **options)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(0, 3, dtype=torch.int64), "empty"),
        (torch.zeros(2, 0, dtype=torch.int64), "empty"),
        (torch.tensor([4, 5]), "must be a tensor of integers"),
        (torch.tensor([[4.0]]), "must be a tensor of integers"),
        ([[4, 5]], "must be a tensor of integers"),
        (torch.tensor([[4, VOCABULARY]]), f"holds {VOCABULARY}.*{VOCABULARY} entries"),
        (torch.tensor([[4, -1]]), "holds -1"),
    ],
    ids=str,
)
def test_prompts_that_are_none(ids: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decoder("llama").ours.generate(ids, max_new_tokens=2)


def test_what_asks_for_nothing_is_let_through() -> None:
    d = decoder("llama")
    prompt = torch.tensor([[5, 6, 7]])
    expected = d.ours.generate(prompt, max_new_tokens=5)
    nothing = {
        "num_beams": 1,
        "logits_processor": [],
        "stopping_criteria": None,
        "length_penalty": 1.0,
        "bad_words_ids": None,
    }
    assert torch.equal(d.ours.generate(prompt, max_new_tokens=5, temperature=0.0, **nothing), expected)
