"""Chat templates against transformers, and templates that mean harm."""

from __future__ import annotations

import time
from functools import cache
from typing import Any, Literal, Optional, Union

import hypothesis.strategies as st
import pytest
import tokenizer_folders as folders
import torch
import transformers
from hypothesis import given
from strategies import examples
from transformers.utils import get_json_schema

from minilm.text import chat_template
from minilm.text.chat_template import ChatTemplateError
from minilm.text.tokenizer import AutoTokenizer, Tokenizer, TokenizerError
from minilm.text.tool_schema import tool_schema

# Each uses what templates of well-known models use.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "alternating": (
        "{{ bos_token }}{% for message in messages %}\n"
        "    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
        "        {{ raise_exception('Conversation roles must alternate user/assistant/...') }}\n"
        "    {% endif %}\n"
        "    {% if message.role == 'user' %}[INST] {{ message['content'] | trim }} [/INST]"
        "{%- else %} {{ message['content'] }}{{ eos_token }}{% endif -%}\n"
        "{% endfor %}"
    ),
    "tools": (
        "{%- if tools %}{{ 'Tools:\n' }}{% for tool in tools %}{{ tool | tojson(indent=2) }}"
        "{{ '\n' }}{% endfor %}"
        "{%- else %}{{ '<&> none' | tojson }}{% endif %}"
        "{% for d in documents or [] %}{{ d.title }}{% endfor %}"
        "{%- set ns = namespace(last='') %}{%- for m in messages if m.role != 'system' %}"
        "{%- if not m.content %}{% continue %}{% endif %}{% set ns.last = m.content %}"
        "{%- macro shout(x) %}{{ x | upper }}{% endmacro %}{{ shout(m.role) }}:{{ m.content }};{% endfor %}"
        "{{ ns.last.split(' ')[-1] }}{{ thinking | default('no') }}{{ date_string is defined }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "A:{% generation %}{{ m.content }}!{% endgeneration %}\n"
        "{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
    ),
}


@cache
def pair() -> tuple[Any, Tokenizer]:
    theirs = transformers.AutoTokenizer.from_pretrained(str(folders.gpt2()))
    ours = AutoTokenizer.from_pretrained(folders.gpt2())
    theirs.pad_token = ours.pad_token = "!"
    return theirs, ours


roles = st.sampled_from(["system", "user", "assistant", "tool"])
messages = st.fixed_dictionaries({"role": roles, "content": folders.texts()})
conversations = st.lists(messages, min_size=1, max_size=4)


@pytest.mark.parametrize("name", TEMPLATES)
@examples(60)
@given(data=st.data())
def test_templates(name: str, data: st.DataObject) -> None:
    theirs, ours = pair()
    conversation: Any = data.draw(conversations)
    if name == "alternating":
        for index, message in enumerate(conversation):
            message["role"] = ("user", "assistant")[(index + data.draw(st.sampled_from([0, 0, 1]))) % 2]
    if data.draw(st.booleans()):
        conversation = [conversation, data.draw(conversations)]
    options: dict[str, Any] = {
        "chat_template": TEMPLATES[name],
        "tokenize": data.draw(st.booleans()),
        "return_dict": data.draw(st.booleans()),
        "return_tensors": data.draw(st.sampled_from([None, "pt"])),
        "padding": True,
        "add_generation_prompt": data.draw(st.booleans()),
        "tools": data.draw(st.sampled_from([None, [], [{"name": "f", "x": "ü<&"}]])),
        "documents": data.draw(st.sampled_from([None, [{"title": "T", "text": "x"}]])),
    }
    if data.draw(st.booleans()):
        options["thinking"] = "yes"
    if name == "generation" and options["tokenize"] and options["return_dict"]:
        options["return_assistant_tokens_mask"] = data.draw(st.booleans())
    try:
        expected = theirs.apply_chat_template(conversation, **options)
    except Exception as problem:
        with pytest.raises(TokenizerError) as caught:
            ours.apply_chat_template(conversation, **options)
        if "alternate" in str(problem):
            assert "Conversation roles must alternate" in str(caught.value)
        return
    found = ours.apply_chat_template(conversation, **options)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found)
    elif isinstance(expected, (str, list)):
        assert found == expected
    else:
        assert list(found) == list(expected)
        for key in expected:
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(expected[key])), key


@examples(100)
@given(
    conversation=conversations, name=st.sampled_from(["chatml", "alternating", "tools"]), blocks=st.booleans()
)
def test_continue_the_final_message(conversation: Any, name: str, blocks: bool) -> None:
    theirs, ours = pair()
    if blocks:
        conversation[-1]["content"] = [{"type": "text", "text": conversation[-1]["content"]}]
    options = {"chat_template": TEMPLATES[name], "continue_final_message": True, "tokenize": False}
    try:
        expected = theirs.apply_chat_template(conversation, **options)
    except Exception:
        with pytest.raises(ChatTemplateError):
            ours.apply_chat_template(conversation, **options)
        return
    assert ours.apply_chat_template(conversation, **options) == expected


def test_smollm() -> None:
    file = folders.smollm_file()
    ours = AutoTokenizer.from_pretrained(file)
    chat = [
        {"role": "user", "content": "Hi 12"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "ä"},
    ]
    text = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\nyes?<|im_end|>\n"
        "<|im_start|>user\nä<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ours.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == ours.encode(text)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours.backend_tokenizer)
    theirs.chat_template = ours.chat_template
    assert theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == ours.encode(text)


def test_named_templates() -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders.gpt2())
    chat = [{"role": "user", "content": "x"}]
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        tokenizer.apply_chat_template(chat)
    tokenizer.chat_template = {"default": "D{{ messages[0].content }}", "tool_use": "T", "rag": "R"}
    for options, text in (
        ({}, "Dx"),
        ({"tools": []}, "T"),
        ({"chat_template": "rag"}, "R"),
        ({"chat_template": "N"}, "N"),
    ):
        assert tokenizer.apply_chat_template(chat, tokenize=False, **options) == text
    tokenizer.chat_template = {"rag": "R"}
    with pytest.raises(ChatTemplateError, match="no default, name one with chat_template=: rag"):
        tokenizer.apply_chat_template(chat)


def test_time() -> None:
    text, _ = chat_template.render("{{ strftime_now('%Y') }}", [{"role": "user", "content": ""}])
    assert text == time.strftime("%Y")


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ self._TemplateReference__context }}{{ lipsum.__globals__['os'] }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{% for a in range(10**9) %}x{% endfor %}",
    "{% for a in range(1000000) %}x{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ [0] * 9999999999 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ undefined.attribute }}",
    "{% for %}",
    "{{ messages[0].content + 1 }}",
    "{{ 1 // 0 }}",
    "{{ raise_exception('no') }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_templates(template: str) -> None:
    conversation = [{"role": "user", "content": "x"}]
    with pytest.raises(ChatTemplateError, match="the chat template"):
        chat_template.render(template, conversation)
    assert conversation == [{"role": "user", "content": "x"}]


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="runs for more than"):
        chat_template.render(endless, [{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        ([], {}, "expected a list of messages"),
        ("hello", {}, "expected a list of messages, got 'hello'"),
        ([[]], {}, "expected a list of messages"),
        (["hello"], {}, "expected a list of messages, got 'hello'"),
        ([{"role": "user", "content": "x"}, "y"], {}, "expected messages as dicts"),
        ([{"role": "user"}], {"continue_final_message": True}, "the last message has no 'content'"),
        ([{"role": "user", "content": "x"}], {"continue_final_message": "thought"}, "has no 'thought'"),
        (
            [{"role": "user", "content": "x"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "cannot be combined",
        ),
        (
            [{"role": "user", "content": "x"}],
            {"return_assistant_tokens_mask": True, "tokenize": False},
            "needs",
        ),
        ([{"role": "user", "content": "x"}], {"tools": [3]}, "tools: expected JSON schemas"),
        ([{"role": "user", "content": "x"}], {"documents": ["x"]}, "documents: expected dicts"),
        ([{"role": "user", "content": "x"}], {"chat_template": 3}, "expected a chat template as a string"),
    ],
)
def test_wrong_calls(conversation: Any, options: dict[str, Any], message: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders.gpt2(), chat_template=TEMPLATES["chatml"])
    with pytest.raises(ChatTemplateError, match=message):
        tokenizer.apply_chat_template(conversation, **options)


# -- tools from functions


def weather(
    city: str,
    days: int = 1,
    units: Literal["c", "f"] = "c",
    where: Optional[list[float]] = None,  # noqa: UP045
    extra: Union[int, str] = 0,  # noqa: UP007
    table: dict[str, list[int]] | None = None,
    point: tuple[int, str] = (0, ""),
    anything: Any = None,
    mood: str = "sun",
) -> dict[str, float]:
    """Tells the weather.

    For some days, that is.

    Args:
        city: Where, in
            a city.
        days: How many.
        units: Which degrees.
        where: Coordinates.
        extra: More.
        table: A table.
        point: A point.
        anything: Whatever.
        mood: How it is (choices: ["sun", "rain"])

    Returns:
        Degrees by hour.
    """
    raise NotImplementedError


def nothing() -> None:
    """Does nothing."""


class Robot:
    def move(self, x: int) -> bool:
        """Moves.

        Args:
            x: How far.
        """
        return x > 0


@pytest.mark.parametrize("function", [weather, nothing, Robot().move])
def test_tool_schema(function: Any) -> None:
    assert tool_schema(function) == get_json_schema(function)
    ours = AutoTokenizer.from_pretrained(folders.gpt2(), chat_template=TEMPLATES["tools"])
    theirs = transformers.AutoTokenizer.from_pretrained(str(folders.gpt2()))
    chat = [{"role": "user", "content": "x"}]
    options: dict[str, Any] = {"tools": [function], "tokenize": False, "chat_template": TEMPLATES["tools"]}
    assert ours.apply_chat_template(chat, **options) == theirs.apply_chat_template(chat, **options)


def test_tool_schema_errors() -> None:
    def undocumented(x: int) -> None: ...

    def untyped(x) -> None:  # type: ignore[no-untyped-def]
        """Text."""

    def undescribed(x: int) -> None:
        """Text."""

    def strange(x: set[int]) -> None:
        """Text.

        Args:
            x: A set.
        """

    for function, message in (
        (undocumented, "has no docstring"),
        (untyped, "the argument x has no type"),
        (undescribed, "does not describe the argument x"),
        (strange, "no JSON schema"),
    ):
        with pytest.raises(TokenizerError, match=message):
            tool_schema(function)
