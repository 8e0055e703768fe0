"""The interactive part of `minilm chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

from ...generation import SamplingParams
from ...ops.backends import packed
from .wrapping import Wrapped

Message = dict[str, str]


class Stream(Protocol):
    """The pieces of an answer. `close` cancels it; `output` is set when it has ended."""

    def __iter__(self) -> Iterator[str]: ...

    def close(self) -> None: ...

    @property
    def output(self) -> Any: ...


Answer = Callable[[list[Message], SamplingParams], Stream]

COMMANDS = {
    "/reset": "begin anew",
    "/retry": "answer the last question again",
    "/system TEXT": "set the system message and start a new conversation (without TEXT: show it)",
    "/set NAME VALUE": "change a sampling option: /set temperature 0.3 (without NAME: show all)",
    "/save FILE": "save the conversation to FILE as JSON",
    "/help": "this list",
    "/quit": "end the program (also Ctrl-D)",
}
SETTABLE = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "max_same_sentence", "seed"),
)


class Conversation:
    """Alternates questions and answers. `answer` returns the pieces of the answer to a list of messages;
    `forget` is called when a conversation begins anew."""

    def __init__(
        self,
        answer: Answer,
        params: SamplingParams,
        system: str | None = None,
        forget: Callable[[], object] = lambda: None,
    ) -> None:
        self.answer = answer
        self.params = params
        self.system = system
        self.forget = forget
        self.messages: list[Message] = []

    def run(self) -> None:
        """Read and answer until /quit or the end of input. Ctrl-C stops an answer; at the prompt, Ctrl-C
        twice ends the program."""
        import readline  # noqa: F401 - gives input() line editing and a history

        print("Ctrl-C stops an answer; /help lists the commands, /quit or Ctrl-D ends.")
        _forget_typed()
        interrupted = False
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                print("\n(Ctrl-C again, or /quit, ends)")
                continue
            interrupted = False
            if line.startswith("/"):
                if not self.command(line):
                    return
            elif line:
                self.turn(line)

    def command(self, line: str) -> bool:
        """Execute a line that begins with a slash; returns False if it ends the conversation."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self.begin_anew()
            print("(a new conversation)")
        elif name == "/retry":
            self.retry()
        elif name == "/set":
            self.set(rest)
        elif name == "/save":
            self.save(rest)
        elif name == "/system":
            if rest:
                self.system = rest
                self.begin_anew()
                print("(a new conversation)")
            else:
                print(f"({self.system or 'no system message'})")
        else:
            if name != "/help":
                print(f"there is no command {name}")
            width = max(map(len, COMMANDS))
            print("\n".join(f"{key:<{width}}  {what}" for key, what in COMMANDS.items()))
        return True

    def begin_anew(self) -> None:
        """Drop the messages, and what is kept of them."""
        self.messages.clear()
        self.forget()

    def retry(self) -> None:
        """Answer the last question again. The answer differs, unless the seed is fixed or the temperature is
        0."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages:
            print("(there is no question yet)")
            return
        self.turn(self.messages.pop()["content"])

    def set(self, text: str) -> None:
        """Change one of `SETTABLE`, or show them."""
        name, _, value = text.replace("=", " ").partition(" ")
        if not text:
            print(f"({describe(self.params)}, max_tokens {self.params.max_tokens}, seed {self.params.seed})")
        elif name not in SETTABLE or not value.strip():
            print(f"/set NAME VALUE, with NAME one of {', '.join(SETTABLE)}")
        else:
            kinds = {field.name: str(field.type) for field in fields(self.params)}
            try:
                number: Any = float(value) if "float" in kinds[name] else int(value)
                self.params = replace(self.params, **{name: number})
                print(f"({name} is now {number})")
            except ValueError as error:
                print(f"error: {error}")

    def save(self, file: str) -> None:
        """Write the messages so far."""
        if not file:
            print("/save FILE")
            return
        try:
            Path(file).write_text(
                json.dumps(self._told(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
            )
            print(f"({len(self._told())} messages in {file})")
        except OSError as error:
            print(f"error: {error}")

    def _told(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def turn(self, question: str) -> None:
        """One question and its answer, printed as it is generated. If an answer fails, its question is
        removed from the conversation; an interrupted answer is kept as far as it got."""
        self.messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        shown = Wrapped(sys.stdout)
        try:
            with closing(self.answer(self._told(), self.params)) as stream:
                for piece in stream:
                    pieces.append(piece)
                    shown.write(piece)
                shown.end()
                if stream.output.outputs[0].finish_reason == "length":
                    print(f"(cut at {self.params.max_tokens} tokens: /set max_tokens N, or --max-tokens)")
        except KeyboardInterrupt:
            shown.end(" (stopped)")
        except (
            ValueError
        ) as error:  # a conversation longer than the window, a template that rejects system messages
            self.messages.pop()
            print(f"error: {error} (/reset starts a new conversation)", file=sys.stderr)
            return
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        packed.trim(code=True)  # a conversation waits for most of its time


def describe(params: SamplingParams) -> str:
    """The sampling options as text."""
    if not params.temperature:
        what = "temperature 0 (the most probable token)"
    else:
        what = f"temperature {params.temperature:g}"
        parts = {"top_p": params.top_p != 1, "top_k": params.top_k > 0, "min_p": params.min_p > 0}
        what += "".join(f", {name} {getattr(params, name):g}" for name, said in parts.items() if said)
    usual = {"repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0}
    changed = {name: getattr(params, name) for name, value in usual.items() if getattr(params, name) != value}
    if params.max_same_sentence is not None:
        changed["max_same_sentence"] = params.max_same_sentence
    return what + "".join(f", {name} {value:g}" for name, value in changed.items())


def _forget_typed() -> None:
    """Discard what was typed while the model was loading."""
    with suppress(ImportError, OSError, ValueError):
        import termios

        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
