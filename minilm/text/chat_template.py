"""Chat templates: a checkpoint's own Jinja program that turns messages into the text it was trained on.

A template is code from a stranger. It runs in jinja2's immutable sandbox: no attributes that lead out of
it, no changes to what it is given, ranges of at most 100,000; beyond that, repetition (`"x" * n`), the
length of what it writes and the time it takes have limits here."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .vocabulary import TokenizerError

if TYPE_CHECKING:
    from jinja2 import Template

Messages = Sequence[Mapping[str, Any]]

MAX_CHARACTERS = 20_000_000
MAX_SECONDS = 20.0

# Around what {% generation %} ... {% endgeneration %} writes; noncharacters, which no text contains.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplateError(TokenizerError):
    """A chat template that is damaged, refuses the messages, or does what the sandbox forbids."""


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

    `continue_final_message`: the text ends within the last message, for the model to go on with; a string
    names the message's field to continue, True means "content". `variables` are what else the template
    sees."""
    if tools is not None:
        tools = [_tool(tool) for tool in tools]
    if documents is not None and not all(isinstance(document, Mapping) for document in documents):
        raise ChatTemplateError("documents: expected dicts with 'title' and 'text'")
    final = ""
    if continue_final_message:
        name = continue_final_message if isinstance(continue_final_message, str) else "content"
        messages, final = _leave_open(messages, name, template)
    text = _run(
        template,
        {
            **(variables or {}),
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "_mark_generation": mark_generation,
        },
    )
    if continue_final_message:
        text = _cut_open(text, final)
    return _take_marks(text) if mark_generation else (text, [])


def read(value: Any, source: str) -> str | dict[str, str] | None:
    """A `chat_template` as files have it (a template, several by name, or a list of {"name", "template"})
    as a string, a dict, or None. `source` is named in errors."""
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
    """The template to use: `asked` is a template or the name of one of the tokenizer's `own`."""
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


def _run(template: str, variables: Mapping[str, Any]) -> str:
    import jinja2

    try:
        compiled = _compile(template)
        pieces, length = [], 0
        compiled.environment.deadline = time.monotonic() + MAX_SECONDS  # type: ignore[attr-defined]
        for piece in compiled.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise ChatTemplateError(f"the chat template writes more than {MAX_CHARACTERS} characters")
        return "".join(pieces)
    except ChatTemplateError:
        raise
    except jinja2.TemplateSyntaxError as problem:
        raise ChatTemplateError(
            f"the chat template is damaged: line {problem.lineno}: {problem.message}"
        ) from problem
    except jinja2.exceptions.SecurityError as problem:
        raise ChatTemplateError(f"the chat template does what the sandbox forbids: {problem}") from problem
    except jinja2.TemplateError as problem:  # among them what the template says with raise_exception()
        raise ChatTemplateError(f"the chat template refuses these messages: {problem}") from problem
    except Exception as problem:  # a template can raise whatever Python can: TypeError, RecursionError, ...
        raise ChatTemplateError(f"the chat template fails: {type(problem).__name__}: {problem}") from problem


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> Template:
    if not isinstance(template, str):
        raise ChatTemplateError(f"expected a chat template as a string, got {type(template).__name__}")
    environment = _environment()(trim_blocks=True, lstrip_blocks=True, extensions=_extensions())
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    compiled: Template = environment.from_string(template)
    return compiled


@functools.cache
def _environment() -> Any:
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])
        deadline = float("inf")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                raise SecurityError("powers are not available")
            for text, count in ((left, right), (right, left)):
                if (
                    isinstance(text, (str, list, tuple))
                    and isinstance(count, int)
                    and len(text) * count > 1 << 20
                ):
                    raise SecurityError(f"a repetition of {len(text)} * {count} is too long")
            return super().call_binop(context, operator, left, right)

        def call(self, *arguments: Any, **named: Any) -> Any:
            if time.monotonic() > self.deadline:
                raise SecurityError(f"it runs for more than {MAX_SECONDS:.0f} seconds")
            return super().call(*arguments, **named)

    return Sandbox


@functools.cache
def _extensions() -> list[Any]:
    import jinja2
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        """{% generation %} marks what the assistant wrote; it changes nothing of the text."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked", [jinja2.nodes.ContextReference()])
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        @staticmethod
        def _marked(context: Any, caller: Callable[[], str]) -> str:
            text = caller()
            return f"{_OPEN}{text}{_CLOSE}" if context.get("_mark_generation") else text

    return [Generation, loopcontrols]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes "<" and "&" for HTML, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _tool(tool: Any) -> Any:
    if isinstance(tool, Mapping):
        return tool
    if callable(tool):
        from .tool_schema import tool_schema

        return tool_schema(tool)
    raise ChatTemplateError(f"tools: expected JSON schemas as dicts, or functions, got {type(tool).__name__}")


def _leave_open(messages: Messages, name: str, template: str) -> tuple[Messages, str]:
    """The messages with a mark at the end of the last one, and the text before the mark."""
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
            "continue_final_message: the chat template does not write the last message as it is"
        )
    at = text.rindex(mark)
    kept = text[:at]
    # A template that trims the message has also trimmed the space behind the mark.
    return kept if text[at:].startswith(_CONTINUE) else kept.rstrip()


def _take_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    plain: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if piece == _OPEN:
            start = length
        elif piece == _CLOSE:
            spans.append((start, length))
        else:
            plain.append(piece)
            length += len(piece)
    return "".join(plain), spans
