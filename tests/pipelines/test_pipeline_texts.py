"""text-generation with sentencepiece, where the first new word has its space in its token; chats with tool
calls and with content in parts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tokenizer_folders as folders
import torch

from minilm import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from minilm.pipelines import pipeline

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% elif m.content %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% if m.tool_calls %}"
    "{{ m.tool_calls | tojson }}{% endif %}{% if not loop.last %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %};[assistant]{% endif %}"
)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@cache
def made(kind: str) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(getattr(folders, kind)(), chat_template=TEMPLATE)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu"), tokenizer


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_space_before_the_first_new_word(kind: str) -> None:
    ours, tokenizer = made(kind)
    spaced = 0
    prompts = [" ".join(line.split()[:n]) for line in folders.corpus()[5:60] for n in (1, 2, 3)]
    for prompt in prompts:
        before = tokenizer.encode(prompt)
        if not prompt or "\ufffd" in prompt:
            continue
        ids = ours(prompt, **GREEDY, return_tensors=True)[0]["generated_token_ids"]
        whole, start = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, before))
        if not whole.startswith(start):
            continue
        new = whole[len(start) :]
        spaced += new.startswith(" ")
        assert ours(prompt, **GREEDY)[0]["generated_text"] == prompt + new
        assert ours(prompt, **GREEDY, return_full_text=False)[0]["generated_text"] == new
    assert spaced > 3


def test_an_answer_that_goes_on_keeps_its_space() -> None:
    ours, tokenizer = made("llama")
    spaced = 0
    for line in folders.corpus()[5:30]:
        content = " ".join(line.split()[:3])
        for message in (content, [{"type": "text", "text": content}]):
            chat = [
                {"role": "user", "content": "Who"},
                {"role": "assistant", "content": message, "name": "x"},
            ]
            ids = ours(chat, **GREEDY, return_tensors=True)[0]["generated_token_ids"]
            answer = ours(chat, **GREEDY)[0]["generated_text"]
            last = answer[-1]["content"]
            found = last if isinstance(last, str) else last[-1]["text"]
            assert answer[-1]["name"] == "x"
            assert chat[-1]["content"] == message  # what was given stays as it is
            if tokenizer.convert_ids_to_tokens(ids[-6]).startswith("\u2581"):
                spaced += 1
                assert found[len(content) :].startswith(" ")
    assert spaced


@pytest.mark.parametrize("extra", [{}, {"content": None}])
def test_messages_with_tool_calls_have_no_content(extra: dict[str, Any]) -> None:
    ours, _ = made("llama")
    call = {"role": "assistant", "tool_calls": [CALL], **extra}
    tool = {"role": "tool", "content": "Anna"}
    for chat in (
        [{"role": "user", "content": "Who?"}, call, tool],
        [{"role": "user", "content": "Who?"}, call],
    ):
        answer = ours(chat, **GREEDY)[0]["generated_text"]
        assert answer[:-1] == chat
        assert answer[-1]["role"] == "assistant"
        assert len(ours([chat, chat], **GREEDY)) == 2
