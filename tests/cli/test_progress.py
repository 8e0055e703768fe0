"""Progress messages: written at once, differently on a terminal and elsewhere, and erased at the end."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from cli_runs import Terminal

from minilm.cli import errors
from minilm.cli.progress import Progress, duration


class Stream(io.StringIO):
    """Lets a test wait for what a thread writes."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal, self.written = terminal, threading.Semaphore(0)

    def isatty(self) -> bool:
        return self.terminal

    def flush(self) -> None:
        self.written.release()

    def wait(self, times: int) -> str:
        for _ in range(times):
            assert self.written.acquire(timeout=60)
        return self.getvalue()


def test_elsewhere_each_sign_is_a_line_and_the_first_is_there_at_once() -> None:
    stream, count = Stream(terminal=False), iter(range(1000))
    with Progress(lambda: f"step {next(count)}", stream=stream, every=0.001) as progress:
        assert stream.wait(1).startswith("step 0\n")
        stream.wait(2)
        progress.say("told")
    lines = stream.getvalue().splitlines()
    assert lines.count("told") == 1
    lines.remove("told")
    assert lines == [f"step {at}" for at in range(len(lines))]
    assert len(lines) >= 3


def test_elsewhere_the_same_words_are_not_repeated() -> None:
    asked = threading.Semaphore(0)

    def words() -> str:
        asked.release()
        return "the same"

    stream = Stream(terminal=False)
    with Progress(words, stream=stream, every=0.001):
        for _ in range(5):
            assert asked.acquire(timeout=60)
    assert stream.getvalue() == "the same\n"


def test_on_a_terminal_one_line_is_written_over_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    said = iter(["a long line that a terminal has no room for", *["short"] * 1000])
    stream = Stream(terminal=True)
    with Progress(lambda: next(said), stream=stream, every=0.001):
        stream.wait(3)
        for erase in errors.before_a_line:  # as an error or a warning does
            erase()
    assert not errors.before_a_line
    text = stream.getvalue()
    assert "\n" not in text
    screen = text.split("\r")
    assert screen[1] == "a long line that a "
    assert screen[2] == "short" + 14 * " "
    assert screen[-1] == ""
    assert not screen[-2].strip()


def test_an_error_ends_it() -> None:
    stream = Stream(terminal=True)
    with pytest.raises(ValueError, match="inside"), Progress(lambda: "words", stream=stream):
        raise ValueError("inside")
    assert not [thread for thread in threading.enumerate() if thread.name == "minilm-progress"]
    assert stream.getvalue().endswith("\r")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (60.0, "1:00 min"), (125.0, "2:05 min"), (7384.0, "2:03:04 h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_model_that_is_loaded_is_said_first_of_all(tmp_path: Path) -> None:
    terminal = Terminal("embed", "--model", tmp_path / "nothing", "tea")
    assert terminal.wait_for("\n") == f"loading {tmp_path / 'nothing'} ..."
    assert terminal.finish() == 2
    assert terminal.shown == f"error: no such file or folder: {tmp_path / 'nothing'}\n"
