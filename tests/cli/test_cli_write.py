"""`generate` and `chat`: what is written is what the library writes; a conversation can be stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Terminal, failure, process, records, run, save_chat_model

import minilm
from minilm.cli.commands.conversation import Conversation, Message

PROMPTS = ["the old man", "mary works in london; anna was in", "river"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def llm(model: Path) -> minilm.LLM:
    return minilm.LLM(model, device="cpu")


def greedy(tokens: int) -> minilm.SamplingParams:
    return minilm.SamplingParams(temperature=0.0, max_tokens=tokens)


def test_generate(model: Path, llm: minilm.LLM) -> None:
    found = records("generate", "--model", model, "--max-tokens", "9", *PROMPTS)
    for record, answer in zip(found, llm.generate(PROMPTS, greedy(9), use_tqdm=False), strict=True):
        assert record == {
            "prompt": answer.prompt,
            "text": answer.outputs[0].text,
            "token_ids": answer.outputs[0].token_ids,
            "prompt_tokens": len(answer.prompt_token_ids),
            "finish_reason": answer.outputs[0].finish_reason,
        }
    assert len({record["text"] for record in found}) == 3
    for record in found:  # together as alone
        assert records("generate", "--model", model, "--max-tokens", "9", record["prompt"]) == [record]


def test_generate_draws_by_its_seed(model: Path) -> None:
    def drawn(seed: int) -> list[Any]:
        options = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--seed", str(seed))
        return records("generate", "--model", model, "--max-tokens", "8", *options, *PROMPTS)

    assert drawn(1) == drawn(1) != drawn(2)


def test_generate_stops_before_a_text(model: Path) -> None:
    (whole,) = records("generate", "--model", model, "--max-tokens", "30", PROMPTS[0])
    stop = whole["text"][5:8]
    (cut,) = records("generate", "--model", model, "--max-tokens", "30", "--stop", stop, PROMPTS[0])
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert (whole["finish_reason"], cut["finish_reason"]) == ("length", "stop")


def test_a_prompt_that_fills_the_window(model: Path) -> None:
    result = run("generate", "--model", model, "tea " * 400, status=2)
    assert "the prompt has 402 tokens" in result.stderr
    assert "window is 256 tokens" in result.stderr


def test_sampling_options_are_checked(model: Path) -> None:
    assert "--temperature" in failure("generate", "--model", model, "--temperature", "-1", "tea")
    assert "top_p" in failure("generate", "--model", model, "--top-p", "3", "tea")
    assert "empty" in failure("generate", "--model", model, "")


def question(text: str, system: str | None = None) -> list[Message]:
    said = [] if system is None else [{"role": "system", "content": system}]
    return [*said, {"role": "user", "content": text}]


def test_one_question(model: Path, llm: minilm.LLM) -> None:
    command = ("chat", "--model", model, "--max-tokens", "7")
    (answer,) = llm.chat(question("where is tea"), greedy(7), use_tqdm=False)
    (told,) = llm.chat(question("where is tea", "be brief"), greedy(7), use_tqdm=False)
    assert run(*command, "where is tea").stdout == answer.outputs[0].text + "\n"
    assert run(*command, stdin="where is tea\n").stdout == answer.outputs[0].text + "\n"
    assert run(*command, "--system", "be brief", "where is tea").stdout == told.outputs[0].text + "\n"
    assert told.outputs[0].text != answer.outputs[0].text
    (record,) = records(*command, "--json", "where is tea")
    assert record["messages"] == question("where is tea")
    assert record["token_ids"] == answer.outputs[0].token_ids
    assert "no text in standard input" in failure(*command)


def test_several_words_are_one_question(model: Path) -> None:
    command = ("chat", "--model", model, "--max-tokens", "7")
    assert run(*command, "where", "is", "tea").stdout == run(*command, "where is tea").stdout


def test_the_pieces_come_as_they_are_written(model: Path) -> None:
    """On a terminal a single prompt is continued at once; nothing is repeated or lost."""
    (whole,) = records("generate", "--model", model, "--max-tokens", "40", PROMPTS[0])
    terminal = Terminal("generate", "--model", model, "--max-tokens", "40", PROMPTS[0])
    assert terminal.finish() == 0
    assert (whole["prompt"] + whole["text"]).replace("\r", "") in terminal.shown
    assert "(40 tokens in " in terminal.shown


# Conversations
class Script:
    """Stands in for the model and for the person: answers are the last word in capitals."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
        self.asked: list[list[Message]] = []
        self.closed = 0
        typed = iter(lines)

        def read(prompt: str) -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)

    def __call__(self, messages: list[Message]) -> Any:
        self.asked.append([dict(message) for message in messages])
        script = self

        class Pieces:
            def __iter__(self) -> Iterator[str]:
                word = messages[-1]["content"].split()[-1]
                yield word.upper()
                if word == "forever":
                    raise KeyboardInterrupt
                if word == "long":
                    raise ValueError("longer than the window")
                yield "!"

            def close(self) -> None:
                script.closed += 1

        return Pieces()


def test_a_conversation_remembers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(monkeypatch, "hello", "", "  who am i ", "/reset", "again", "/quit", "not read")
    Conversation(script, "be kind").run()
    system = {"role": "system", "content": "be kind"}
    first = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "HELLO!"}]
    assert script.asked == [
        [system, first[0]],
        [system, *first, {"role": "user", "content": "who am i"}],
        [system, {"role": "user", "content": "again"}],
    ]
    assert script.closed == 3
    shown = capsys.readouterr().out
    assert "HELLO!" in shown
    assert "AGAIN!" in shown


def test_the_system_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Script(monkeypatch, "/system", "one", "/system  in rhyme ", "two", "/system", "/help", "/what")
    Conversation(script).run()
    assert [messages[0]["content"] for messages in script.asked] == ["one", "in rhyme"]
    shown = capsys.readouterr().out
    assert "(nothing was said)" in shown
    assert "(in rhyme)" in shown
    assert "there is no command /what" in shown


def test_ctrl_c_stops_an_answer_which_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, "go on forever", "and now")
    Conversation(script).run()
    assert script.asked[1] == [
        {"role": "user", "content": "go on forever"},
        {"role": "assistant", "content": "FOREVER"},
        {"role": "user", "content": "and now"},
    ]
    assert script.closed == 2


def test_ctrl_c_twice_at_the_prompt_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, KeyboardInterrupt, "tea", KeyboardInterrupt, KeyboardInterrupt, "not read")
    with pytest.raises(KeyboardInterrupt):
        Conversation(script).run()
    assert len(script.asked) == 1


def test_a_question_that_cannot_be_answered_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(monkeypatch, "too long", "tea")
    Conversation(script).run()
    assert script.asked[1] == [{"role": "user", "content": "tea"}]
    assert "error: longer than the window" in capsys.readouterr().err


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    """With a real model, whose answers are long: Ctrl-C stops one, and the next question is answered."""
    model = save_chat_model(tmp_path, window=100_000)
    terminal = Terminal("chat", "--model", model, "--max-tokens", "90000")
    terminal.wait_for("> ")
    terminal.type("tea\n")
    terminal.wait_for("tea\n")
    while len(terminal.shown) < 20:
        assert terminal._read()
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.type("/system be brief\n")
    terminal.wait_for("(a new conversation)")
    terminal.wait_for("> ")
    terminal.type("river\n")
    terminal.wait_for("river\n")
    while len(terminal.shown) < 20:
        assert terminal._read()
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.finish() == 0


def test_a_conversation_is_not_json(model: Path) -> None:
    terminal = Terminal("chat", "--model", model, "--json")
    assert terminal.finish() == 2
    assert "error: a conversation is not written as JSON" in terminal.shown


@pytest.mark.slow
def test_the_default_model_answers() -> None:
    finished = process("chat", "What is the capital of France?", "--max-tokens", "20")
    assert finished.returncode == 0
    assert "Paris" in finished.stdout
    assert finished.stderr == ""
