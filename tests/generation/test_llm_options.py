"""Options that change nothing are said, by one warning with all of them; those that ask for what is done
anyway are let through; those that come too late are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from tiny_decoders import decoder

import minilm
from minilm import LLM
from minilm.generation.llm import NO_EFFECT
from minilm.substitutes import WITHOUT_EFFECT

OTHER: dict[str, Any] = {"tokenizer_mode": "slow", "gpu_memory_utilization": 0.5, "swap_space": 4}


def other(name: str, silent: tuple[Any, ...]) -> Any:
    """A value that asks for something."""
    return OTHER.get(name, True not in silent)


def test_every_option_of_vllm_without_effect_is_said() -> None:
    d = decoder("llama")
    asked = {name: other(name, silent) for name, silent in NO_EFFECT.items() if name != "enforce_eager"}
    with pytest.warns(UserWarning, match="no effect in minilm") as caught:
        LLM(d.ours, tokenizer=d.tokenizer, **asked)
    (message,) = (str(w.message) for w in caught)
    assert all(f"{name}={value!r}" in message for name, value in asked.items())
    with pytest.warns(UserWarning, match=r"^swap_space=4 has no effect in minilm$"):
        LLM(d.folder, swap_space=4)


def test_what_is_done_anyway_needs_no_word() -> None:
    d = decoder("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for place in range(2):
            LLM(d.ours, tokenizer=d.tokenizer, **{name: v[place % len(v)] for name, v in NO_EFFECT.items()})
        for cls in (minilm.AutoModelForCausalLM, minilm.AutoConfig):
            cls.from_pretrained(d.folder, **{name: v[-1] for name, v in WITHOUT_EFFECT.items()})


@pytest.mark.parametrize(
    "cls", ["AutoModelForCausalLM", "AutoModel", "AutoConfig", "LlamaForCausalLM", "LLM"]
)
def test_every_option_of_from_pretrained_without_effect_is_said(cls: str) -> None:
    d = decoder("llama")
    asked = {name: other(name, silent) for name, silent in WITHOUT_EFFECT.items()}
    asked |= {"attn_implementation": "flash_attention_2"}
    load = LLM if cls == "LLM" else getattr(minilm, cls).from_pretrained
    with pytest.warns(UserWarning, match="no effect in minilm") as caught:
        load(d.folder, **asked)
    said = " ".join(str(w.message) for w in caught)
    assert all(f"{name}={value!r}" in said for name, value in asked.items())
    assert len(caught) == (2 if cls == "LLM" else 1), "trust_remote_code is an option of both"


@pytest.mark.parametrize(
    "option", [{"dtype": "bfloat16"}, {"device": "cpu"}, {"revision": "x"}, {"unheard_of": 1}]
)
def test_what_comes_too_late_for_a_loaded_model_is_refused(option: dict[str, Any]) -> None:
    d = decoder("llama")
    with pytest.raises(ValueError, match=f"{next(iter(option))}=: only for loading"):
        LLM(d.ours, tokenizer=d.tokenizer, **option)
