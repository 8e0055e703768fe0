"""The process in which chat templates run. It is started as a script, imports nothing from minilm, and ends
with its parent process.

Requests and replies are JSON, preceded by their length in eight bytes. The operating system enforces the
limits on memory and time, so they hold for everything that the template does, including its compilation.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

MEGABYTE = 1 << 20
_TAG = "\ufdd0"  # a noncharacter; see chat_process.py
_MAX_POWER_BITS = 1024


class Opaque:
    """Placeholder for an object that cannot be sent (an image, a tensor, a function); has only its str()."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text

    __repr__ = __str__


class NoContent(str):
    """The content of a message whose content is None, as with tool calls: `is none` for the template, and
    empty when printed."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other is None or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def restore(found: dict[str, Any]) -> Any:
    """Restore an object that JSON cannot represent from its tagged form."""
    kind = found.get(_TAG)
    if kind is None:
        return found
    value = found["value"]
    if kind == "object":
        return Opaque(value)
    return {"tuple": tuple, "set": set, "dict": dict}[kind](value)


def answer(request: dict[str, Any]) -> tuple[str, str]:
    """Run the template; returns (outcome, text or error message)."""
    import jinja2

    variables = request["variables"]
    for message in variables["messages"]:
        if message.get("content", "") is None:
            message["content"] = NoContent()
    try:
        compiled = compile_template(request["template"])
        compiled.environment.now = request["now"]
        compiled.environment.marks = request["marks"]
        pieces, length = [], 0
        for piece in compiled.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > request["characters"]:
                return "long", ""
        return "text", "".join(pieces)
    except MemoryError:
        return "memory", ""
    except jinja2.TemplateSyntaxError as problem:
        return "damaged", f"line {problem.lineno}: {problem.message}"
    except jinja2.exceptions.SecurityError as problem:
        return "forbidden", str(problem)
    except jinja2.TemplateError as problem:  # includes the template's own raise_exception()
        return "refuses", str(problem)
    except Exception as problem:  # a template can raise any Python error: TypeError, RecursionError, ...
        return "fails", f"{type(problem).__name__}: {problem}"


@functools.lru_cache(maxsize=32)
def compile_template(template: str) -> Any:
    environment = _sandbox()(trim_blocks=True, lstrip_blocks=True, extensions=_extensions())
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.fromisoformat(environment.now).strftime(form)
    environment.tests["none"] = lambda value: value is None or isinstance(value, NoContent)
    environment.tests["string"] = lambda value: isinstance(value, str) and not isinstance(value, NoContent)
    return environment.from_string(template)


@functools.cache
def _sandbox() -> Any:
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """These limits only give clearer messages than those on memory and time."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int) and isinstance(right, int)
            if operator == "**" and numbers and left.bit_length() * right > _MAX_POWER_BITS:
                raise SecurityError("a power is too large")
            for text, count in ((left, right), (right, left)):
                if (
                    operator == "*"
                    and isinstance(text, (str, list, tuple))
                    and isinstance(count, int)
                    and len(text) * count > MEGABYTE
                ):
                    raise SecurityError(f"a repetition of {len(text)} * {count} is too long")
            return super().call_binop(context, operator, left, right)

    return Sandbox


@functools.cache
def _extensions() -> list[Any]:
    import jinja2
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        """{% generation %} marks the assistant's text, without changing it."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            opening, closing = self.environment.marks or ("", "")  # type: ignore[attr-defined]
            return f"{opening}{caller()}{closing}"

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
        _with_none(value),
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_none(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_none(inner) for inner in value]
    return None if isinstance(value, NoContent) else value


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _limit_memory(size: int) -> None:
    """Does nothing on systems without such a limit; the time limit still holds there."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Answer requests until there are no more. Arguments: the folders to import packages from."""
    sys.path[:0] = sys.argv[1:]
    import jinja2
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401 (before the memory is limited)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sink.write(b"ready\n")
    sink.flush()
    while len(head := source.read(16)) == 16:
        size, memory = int.from_bytes(head[:8], "big"), int.from_bytes(head[8:], "big")
        _limit_memory(memory)
        try:
            data = source.read(size).decode("utf-8", "surrogatepass")
            request = json.loads(data, object_hook=restore)
            del data
            if hasattr(signal, "setitimer"):
                # The parent has the same time limit; the alarm is for when the parent is gone. It ends the
                # process in any state.
                signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 5)
            kind, text = answer(request)
            del request
            text = text if kind == "text" else text[:2000]
            reply = json.dumps([kind, text], ensure_ascii=False).encode("utf-8", "surrogatepass")
        except MemoryError:
            reply = b'["memory", ""]'
        sink.write(len(reply).to_bytes(8, "big"))
        sink.write(reply)
        sink.flush()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
