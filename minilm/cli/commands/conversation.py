"""The interactive part of `minilm chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Protocol

Message = dict[str, str]


class Stream(Protocol):
    """The pieces of an answer; `close` gives the rest of it up."""

    def __iter__(self) -> Iterator[str]: ...

    def close(self) -> None: ...


Answer = Callable[[list[Message]], Stream]

COMMANDS = {
    "/reset": "begin anew",
    "/system TEXT": "say how to answer, and begin anew (without TEXT: show what was said)",
    "/help": "this list",
    "/quit": "end (also Ctrl-D)",
}


class Conversation:
    """Questions and answers in turn. `answer` gives the pieces of the answer to a list of messages."""

    def __init__(self, answer: Answer, system: str | None = None) -> None:
        self.answer = answer
        self.system = system
        self.messages: list[Message] = []

    def run(self) -> None:
        """Read and answer until /quit or the end of the input. Ctrl-C stops an answer; at the prompt, twice
        in a row, the program."""
        import readline  # noqa: F401 - gives input() line editing and a history

        print("Ctrl-C stops an answer; /help lists the commands, /quit or Ctrl-D ends.")
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
        """Carry out a line that begins with a slash; False if it ends the conversation."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self.messages.clear()
            print("(a new conversation)")
        elif name == "/system":
            if rest.strip():
                self.system = rest.strip()
                self.messages.clear()
                print("(a new conversation)")
            else:
                print(f"({self.system or 'nothing was said'})")
        else:
            if name != "/help":
                print(f"there is no command {name}")
            width = max(map(len, COMMANDS))
            print("\n".join(f"{key:<{width}}  {what}" for key, what in COMMANDS.items()))
        return True

    def turn(self, question: str) -> None:
        """One question and its answer, printed as it comes. An answer that cannot be given takes its
        question back; what there is of an interrupted one stays."""
        self.messages.append({"role": "user", "content": question})
        told = [{"role": "system", "content": self.system}] if self.system else []
        pieces: list[str] = []
        try:
            with closing(self.answer([*told, *self.messages])) as stream:
                for piece in stream:
                    pieces.append(piece)
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            print()
        except KeyboardInterrupt:
            print(" (stopped)")
        except ValueError as error:  # longer than the window, a template without a system message
            self.messages.pop()
            print(f"error: {error} (/reset begins anew)", file=sys.stderr)
            return
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
