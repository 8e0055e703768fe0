"""Chat templates: a checkpoint's own Jinja program that turns messages into the text it was trained on.

A template is untrusted code. It runs in jinja2's immutable sandbox (no attributes that lead out of it, no
changes to its arguments, ranges of at most 100,000) in a separate process (chat_process.py) with limits on
memory, time and output length. So it sees copies of the messages and variables, and of objects that JSON
cannot represent (an image, a function) only their str()."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from .chat_process import ProcessError, run
from .vocabulary import TokenizerError

Messages = Sequence[Mapping[str, Any]]

MAX_CHARACTERS = 20_000_000
MAX_SECONDS = 20.0

_PROBLEMS = {
    "long": "writes more than {characters} characters",
    "late": "runs for more than the allowed {seconds:g} seconds",
    "memory": "needs more memory than allowed",
    "ended": "crashed the process that it ran in",
    "damaged": "is damaged: {}",
    "forbidden": "does what the sandbox forbids: {}",
    "refuses": "refuses these messages: {}",
    "fails": "fails: {}",
}
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplateError(TokenizerError):
    """A chat template is damaged, refuses the messages, or does something that the sandbox forbids."""


def render(
    template: str,
    messages: Messages,
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    mark_generation: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the spans of characters inside {% generation %} if `mark_generation`.

    `continue_final_message`: the text ends with the last message left open, for the model to continue; a
    string names the field of the message to continue, True means "content". `variables` are passed to the
    template."""
    if tools is not None:
        tools = [_tool(tool) for tool in tools]
    if documents is not None and not all(isinstance(document, Mapping) for document in documents):
        raise ChatTemplateError("documents: expected dicts with 'title' and 'text'")
    final = ""
    if continue_final_message:
        name = continue_final_message if isinstance(continue_final_message, str) else "content"
        messages, final = _leave_open(messages, name, template)
    marks = _marks() if mark_generation else None
    text = _run(
        template,
        {
            **(variables or {}),
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        },
        marks,
    )
    if continue_final_message:
        text = _cut_open(text, final)
    return _take_marks(text, marks) if marks else (text, [])


def read(value: Any, source: str) -> str | dict[str, str] | None:
    """A `chat_template` in any form found in files (a template, a dict of named ones, or a list of {"name",
    "template"}) as a string, a dict, or None. `source` is for error messages."""
    if isinstance(value, (list, tuple)):
        try:
            value = {item["name"]: item["template"] for item in value}
        except (TypeError, KeyError):
            raise ChatTemplateError(
                f"{source}: chat_template: expected a list of names and templates"
            ) from None
    if isinstance(value, Mapping):
        if not all(isinstance(text, str) for item in value.items() for text in item):
            raise ChatTemplateError(f"{source}: chat_template: expected names and templates as strings")
        return dict(value) or None
    if value is not None and not isinstance(value, str):
        raise ChatTemplateError(f"{source}: chat_template is {value!r:.60}, expected a string")
    return value or None


def conversations(value: Any) -> tuple[bool, list[Messages]]:
    """Whether `value` is a list of conversations, and the conversations."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ChatTemplateError(f"expected a list of messages, got {value!r:.60}")
    batched = not isinstance(value[0], Mapping)
    found = [getattr(messages, "messages", messages) for messages in (value if batched else [value])]
    for messages in found:
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ChatTemplateError(f"expected a list of messages, got {messages!r:.60}")
        for message in messages:
            if not isinstance(message, Mapping):
                raise ChatTemplateError(
                    f"expected messages as dicts with 'role' and 'content', got {message!r:.60}"
                )
    return batched, found


def choose(own: str | Mapping[str, str] | None, asked: str | None, tools: Sequence[Any] | None = None) -> str:
    """The template to use: `asked` is a template, or the name of one of the tokenizer's `own` templates."""
    if isinstance(own, Mapping):
        if asked is not None:
            return own.get(asked, asked)
        if tools is not None and "tool_use" in own:
            return own["tool_use"]
        if "default" in own:
            return own["default"]
        raise ChatTemplateError(
            f"the tokenizer has several chat templates and no default, name one with chat_template=: "
            f"{', '.join(sorted(own))}"
        )
    chosen = asked if asked is not None else own
    if chosen is None:
        raise ChatTemplateError(
            "the tokenizer has no chat template (it may belong to a base model): pass chat_template= or set "
            "tokenizer.chat_template"
        )
    return chosen


def _run(template: str, variables: Mapping[str, Any], marks: tuple[str, str] | None) -> str:
    if not isinstance(template, str):
        raise ChatTemplateError(f"expected a chat template as a string, got {type(template).__name__}")
    try:
        kind, text = run(template, variables, seconds=MAX_SECONDS, characters=MAX_CHARACTERS, marks=marks)
    except ProcessError as problem:
        raise ChatTemplateError(f"the chat template cannot run: {problem}") from problem
    except (ValueError, RecursionError) as problem:  # circular, or nested too deeply for JSON
        raise ChatTemplateError(
            f"the chat template cannot get these messages and variables: {problem}"
        ) from problem
    if kind == "text":
        return text
    raise ChatTemplateError(
        f"the chat template {_PROBLEMS[kind].format(text, seconds=MAX_SECONDS, characters=MAX_CHARACTERS)}"
    )


def _tool(tool: Any) -> Any:
    if isinstance(tool, Mapping):
        return tool
    if callable(tool):
        from .tool_schema import tool_schema

        return tool_schema(tool)
    raise ChatTemplateError(f"tools: expected JSON schemas as dicts, or functions, got {type(tool).__name__}")


def _leave_open(messages: Messages, name: str, template: str) -> tuple[Messages, str]:
    """The messages with a marker at the end of the last one, and the text before the marker."""
    changed: Any = deepcopy(list(messages))
    last = changed[-1]
    content = last.get(name)
    if content is None:
        raise ChatTemplateError(f"continue_final_message: the last message has no {name!r}")
    if name not in template:
        raise ChatTemplateError(f"continue_final_message: the chat template does not use {name!r}")
    if isinstance(content, str):
        last[name] = content + _CONTINUE
        return changed, content
    for block in reversed(content):
        if "text" in block:
            text = block["text"]
            block["text"] = text + _CONTINUE
            return changed, text
    raise ChatTemplateError("continue_final_message: the last message has no text")


def _cut_open(text: str, final: str) -> str:
    mark = _CONTINUE.strip()
    if final.strip() not in text or mark not in text:
        raise ChatTemplateError(
            "continue_final_message: the chat template changes the text of the last message"
        )
    at = text.rindex(mark)
    kept = text[:at]
    # A template that trims the message has also trimmed the space after the marker.
    return kept if text[at:].startswith(_CONTINUE) else kept.rstrip()


def _marks() -> tuple[str, str]:
    """Markers around the text of {% generation %} ... {% endgeneration %}: noncharacters and random digits,
    so that no message contains them."""
    nonce = secrets.token_hex(8)
    return f"\ufdd0{nonce}<", f"\ufdd0{nonce}>"


def _take_marks(text: str, marks: tuple[str, str]) -> tuple[str, list[tuple[int, int]]]:
    plain: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = 0
    for piece in re.split(f"({marks[0]}|{marks[1]})", text):
        if piece == marks[0]:
            start = length
        elif piece == marks[1]:
            spans.append((start, length))
        else:
            plain.append(piece)
            length += len(piece)
    return "".join(plain), spans
