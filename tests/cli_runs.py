"""How the tests of the command line run it: in this process, in one of its own, and on a terminal."""

from __future__ import annotations

import codecs
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tiny_models import CORPUS
from typer.testing import CliRunner

from minilm.cli.app import app

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run(*arguments: str | Path, stdin: str | bytes = "", status: int = 0) -> Any:
    """Run the command in this process; `.stdout`, `.stderr` of the result. Checks its exit status."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == status, f"{result.exit_code}: {result.stderr or result.stdout}"
    return result


def records(*arguments: str | Path, stdin: str | bytes = "") -> list[dict[str, Any]]:
    """The JSON lines that the command prints when its output is not a terminal."""
    return [json.loads(line) for line in run(*arguments, stdin=stdin).stdout.splitlines()]


def failure(*arguments: str | Path, stdin: str | bytes = "", status: int = 2) -> str:
    """The one line that the command prints on standard error, and nothing else, when it fails."""
    result = run(*arguments, stdin=stdin, status=status)
    lines: list[str] = result.stderr.splitlines()
    assert result.stdout == ""
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "minilm", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 600, **options}
    finished: subprocess.CompletedProcess[str] = subprocess.run(command, **options)
    return finished


class Terminal:
    """The command on a terminal of 80 columns, to be typed at."""

    def __init__(self, *arguments: str | Path) -> None:
        self._end, far_end = pty.openpty()
        environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "minilm", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=far_end, stdout=far_end, stderr=far_end, env=environment, start_new_session=True,
            preexec_fn=_take_terminal, pass_fds=(far_end,),
        )  # fmt: skip
        os.close(far_end)
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def type(self, text: str) -> None:
        """Type; \\x03 is Ctrl-C, \\x04 Ctrl-D."""
        os.write(self._end, text.encode())

    def wait_for(self, text: str, seconds: float = 600.0) -> str:
        """Read until `text` is shown; returns what was shown until then, and forgets it."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            assert self._read(), f"it ended without {text!r}: {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def finish(self, seconds: float = 600.0) -> int:
        """Read to the end; the exit status. `shown` has what was not waited for."""
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline, self.shown
        os.close(self._end)
        return self.process.wait(seconds)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._end], [], [], 0.2)
        if not ready:
            return True
        try:
            data = os.read(self._end, 4096)
        except OSError:  # Linux: the other end is closed
            return False
        self.shown += self._decoder.decode(data).replace("\r", "")
        return bool(data)


def _take_terminal() -> None:
    """Make standard input the controlling terminal, from which Ctrl-C comes."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def save_chat_model(folder: Path, *, window: int = 256) -> Path:
    """A tiny random Llama with a byte-level tokenizer and a chat template. It hardly ever ends of itself."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS * 3, vocab_size=300, min_frequency=2, special_tokens=["<end>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<end>", model_max_length=window
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=40, max_position_embeddings=window,
        bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    return folder
