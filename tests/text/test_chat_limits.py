"""Chat templates that take too much time or memory, whatever they do; what a template in another process
sees; messages without content; masks of the assistant's tokens."""

from __future__ import annotations

import enum
import os
import threading
import tracemalloc
from typing import Any

import pytest
import tokenizer_folders as folders
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minilm import Tokenizer
from minilm.text import chat_process, chat_template
from minilm.text.chat_template import ChatTemplateError, render

CHAT = [{"role": "user", "content": "x"}]

ENDLESS = [
    "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set k = i + j %}{% endfor %}{% endfor %}",
    "{{ ('a' * 1000000) | wordwrap(1) | length }}",
    "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{% if s[::-1][1:] %}{% endif %}{% endfor %}",
    "{{ lipsum(n=100000) | length }}",
    "{% if (('ab' * 100000) ~ 'c').count('b' * 2) + ('a' * 500000).count('a') %}{% endif %}" * 3000,
    "{{ " + " + ".join(["('a' * 1000000) | wordwrap(1)"] * 3) + " }}",
]
LARGE = [
    "{{ 'x'.center(2000000000) }}",
    "{{ 'x'.ljust(1000000000) | length }}",
    "{{ '%2000000000d' % 1 }}",
    "{{ '%2000000000d' % 1 ~ 'x' }}",
    "{{ '{:>2000000000}'.format(1) }}",
    "{{ '%*d' | format(2000000000, 1) }}",
    "{{ 'x' | center(999999999) }}",
    "{{ ('x\\n' * 500000) | indent(100000) }}",
    "{{ messages | tojson(indent=2000000000) }}",
    "{% set n = namespace(s='x' * 1000000) %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='xx' * 9999) %}{% for i in range(40) %}{% set n.s = n.s.replace('x', 'xx') %}"
    "{% endfor %}",
    "{% set n = namespace(s='x' * 9999) %}{% for i in range(40) %}{% set n.s = [n.s, n.s] | join %}"
    "{% endfor %}",
    "{% set n = namespace(l=[]) %}{% for i in range(9999) %}{% set n.l = [n.l, range(100000) | list] %}"
    "{% endfor %}",
    "{{ '\\t'.expandtabs(2000000000) }}",
]
DEEP = [
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "[" * 100_000 + " }}",
    "{{ " + "-" * 20_000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ 1 if " + "not " * 30_000 + "1 }}",
    "{% macro m() %}{{ m() ~ m() }}{% endmacro %}{{ m() }}",
    "{{ 2 ** 99999999 }}",
]


@pytest.mark.parametrize("template", ENDLESS, ids=range(len(ENDLESS)))
def test_time(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    with pytest.raises(ChatTemplateError, match=r"^the chat template .*$") as caught:
        render(template, CHAT)
    assert "runs for more than" in str(caught.value) or "memory" in str(caught.value)
    monkeypatch.undo()
    assert render("{{ messages[0].content }}", CHAT)[0] == "x"


@pytest.mark.parametrize("template", [*LARGE, *DEEP], ids=range(len(LARGE) + len(DEEP)))
def test_memory_and_depth(template: str) -> None:
    """The error comes from the other process; this one holds none of it."""
    tracemalloc.start()
    try:
        with pytest.raises(ChatTemplateError, match=r"^the chat template "):
            render(template, CHAT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20
    assert render("{{ messages[0].content }}", CHAT)[0] == "x"


def test_what_the_process_may_take_is_set_for_every_template() -> None:
    """A large message needs more memory than a small one, and gets it."""
    message = "日" * 4_000_000
    template = "{% for m in messages %}{{ m.content[1:] ~ m.content[:1] }}{% endfor %}"
    text, _ = render(template, [{"role": "user", "content": message}])
    assert text == message
    with pytest.raises(ChatTemplateError, match="needs more memory"):
        render("{{ 'x'.center(2000000000) }}", CHAT)


def test_the_process_is_kept_and_replaced() -> None:
    render("a", CHAT)
    first = chat_process._state.worker
    render("b", CHAT)
    assert first is not None
    assert chat_process._state.worker is first
    first.kill()
    first.wait()
    assert render("c", CHAT)[0] == "c"
    assert chat_process._state.worker is not first


def test_a_fork_has_a_process_of_its_own() -> None:
    render("a", CHAT)
    worker = chat_process._state.worker
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        text = render("{{ messages[0].content }}{{ 1 + 1 }}", CHAT)[0]
        other = chat_process._state.worker
        os.write(writing, f"{text} {other is not worker}".encode())
        chat_process._end()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"x2 True"
    assert render("b", CHAT)[0] == "b"
    assert chat_process._state.worker is worker


def test_threads() -> None:
    found: list[list[str]] = [[] for _ in range(4)]

    def work(index: int) -> None:
        for turn in range(20):
            found[index].append(render("{{ a }}-{{ b }}", CHAT, variables={"a": index, "b": turn})[0])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[f"{index}-{turn}" for turn in range(20)] for index in range(4)]


class Role(str, enum.Enum):
    USER = "user"


@pytest.mark.parametrize(
    ("value", "template", "text"),
    [
        ((1, "a"), "{{ v }}{{ '%s %s' % v }}", "(1, 'a')1 a"),
        ({1: "a", None: "b"}, "{{ v[1] }}{{ v[none] }}", "ab"),
        ({"\ufdd0": "tuple", "value": [1]}, "{{ v.value }}", "[1]"),
        ({3}, "{{ 3 in v }}", "True"),
        (Role.USER, "{{ v == 'user' }}{{ v }}", "Trueuser"),
        (b"x", "{{ v }}", "b'x'"),
        (float("inf"), "{{ v }}", "inf"),
        ("\ud83d\ude00\ud83d", "{{ v | length }}", "3"),
        (object, "{{ v }}{{ v.__class__.__mro__ }}{{ v is mapping }}", "<class 'object'>False"),
        (10**30, "{{ v + 1 }}", str(10**30 + 1)),
    ],
    ids=repr,
)
def test_values(value: Any, template: str, text: str) -> None:
    if template.endswith("mapping }}"):
        with pytest.raises(ChatTemplateError, match="sandbox forbids"):
            render(template, CHAT, variables={"v": value})
        template, text = "{{ v }}", "<class 'object'>"
    assert render(template, CHAT, variables={"v": value})[0] == text


def test_values_that_cannot_be_sent() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ChatTemplateError, match=r"^the chat template cannot get these messages"):
        render("x", CHAT, variables={"v": circle})


# -- messages without content

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ m.content }}|{{ m['content'] ~ '.' }}|{{ '<' + m.content + '>' }}", "|.|<>"),
        ("{{ m.content | trim }}{{ m.content is none }}{{ m.content is not none }}", "TrueFalse"),
        ("{{ m.content == none }}{{ m.content != none }}{{ m.content is string }}", "TrueFalseFalse"),
        ("{% if m.content %}yes{% endif %}{{ m | tojson }}", '{"role": "assistant", "content": null}'),
        ("{{ m.other is none }}{{ none }}{{ 'a' is none }}", "FalseNoneFalse"),
    ],
)
def test_a_content_of_none_is_none_and_writes_nothing(template: str, text: str) -> None:
    message = {"role": "assistant", "content": None}
    assert render("{% set m = messages[0] %}" + template, [message])[0] == text
    assert message == {"role": "assistant", "content": None}


def test_content_in_parts_and_no_content() -> None:
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% elif m.content is defined and "
        "m.content is iterable %}{% for part in m.content %}"
        "{{ part.text if part.type == 'text' else '<image>' "
        "}}{% endfor %}{% endif %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %};{% endfor %}"
    )
    parts = [{"type": "image", "image": object()}, {"type": "text", "text": "what"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "tool_calls": [CALL]}, *CHAT]
    assert render(template, chat)[0] == (
        '<image>what;[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}];x;'
    )


# -- masks


def byte_level(trim: bool) -> Tokenizer:
    special = ["<|u|>", "<|a|>", "<|e|>"]
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(folders.corpus(), trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    return Tokenizer(tokenizer_object=backend, extra_special_tokens=special)


MASKED = (
    "{% for m in messages %}{% if m.role == 'user' %}<|u|>{{ m.content }}{% else %}<|a|>{% generation %}"
    "{{ m.content }}{% endgeneration %}<|e|>{% endif %}{% endfor %}"
)
TOKENIZERS = {trim: byte_level(trim) for trim in (False, True)}
plain = folders.texts().filter(lambda text: "<|" not in text)


@pytest.mark.parametrize("trim", [False, True])
@examples(60)
@given(answers=st.lists(plain, min_size=1, max_size=3), data=st.data())
def test_masks(trim: bool, answers: list[str], data: st.DataObject) -> None:
    """Special tokens stand around each text, so that the ids alone tell which tokens are the assistant's."""
    tokenizer = TOKENIZERS[trim]
    chat = []
    for answer in answers:
        edges = [data.draw(st.sampled_from(["", " ", "\n", "  ", "\ufdd0", "\u3000"])) for _ in range(2)]
        chat += [
            {"role": "user", "content": data.draw(plain)},
            {"role": "assistant", "content": edges[0] + answer + edges[1]},
        ]
    out = tokenizer.apply_chat_template(chat, chat_template=MASKED, return_assistant_tokens_mask=True)
    bot, end = tokenizer.convert_tokens_to_ids(["<|a|>", "<|e|>"])
    inside, expected = False, []
    for index in out["input_ids"]:
        inside = inside and index != end
        expected.append(int(inside))
        inside = inside or index == bot
    assert out["assistant_masks"] == expected
