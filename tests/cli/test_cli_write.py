"""`generate` and `chat`: the output equals that of the library; a conversation can be stopped."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runs import Terminal, failure, process, records, run, save_chat_model
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

import minilm
from minilm.cli.commands.conversation import Conversation, Message, describe
from minilm.cli.commands.wrapping import Wrapped
from minilm.cli.commands.write import ChatSampling, _llm
from minilm.cli.options import Runtime

PARAMS = minilm.SamplingParams(max_tokens=7)
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


def test_generate_with_beams(model: Path, llm: minilm.LLM) -> None:
    found = records("generate", "--model", model, "--max-tokens", "9", "--beams", "3", *PROMPTS)
    outputs = llm.beam_search(PROMPTS, minilm.BeamSearchParams(beam_width=3, max_tokens=9))
    for record, prompt, output in zip(found, PROMPTS, outputs, strict=True):
        best = output.sequences[0]
        ids = llm.tokenizer(prompt)["input_ids"]
        assert record["token_ids"] == best.tokens[len(ids) :]
        assert llm.tokenizer.decode(best.tokens, skip_special_tokens=True).endswith(record["text"])
        assert record["text"]
        assert (record["prompt"], record["prompt_tokens"]) == (prompt, len(ids))
        assert record["finish_reason"] == best.finish_reason
        assert record["cumulative_logprob"] == pytest.approx(best.cum_logprob)
    one = records("generate", "--model", model, "--max-tokens", "9", "--beams", "1", *PROMPTS)
    for record, answer in zip(one, llm.generate(PROMPTS, greedy(9), use_tqdm=False), strict=True):
        assert record["text"] == answer.outputs[0].text, "one beam is greedy decoding"
    assert (
        PROMPTS[0]
        in run("generate", "--model", model, "--beams", "2", "--max-tokens", "3", PROMPTS[0]).stdout
    )


def test_beams_go_with_no_other_option(model: Path) -> None:
    command = ("generate", "--model", model, "tea", "--beams")
    assert "--beams" in failure(*command, "0")
    for option, value in (("--temperature", "0.5"), ("--top-k", "3"), ("--repetition-penalty", "1.2")):
        error = failure(*command, "3", option, value)
        assert "--beams 3 searches" in error
        assert f"leave out {option} {value}" in error
    assert "leave out --stop ['x']" in failure(*command, "3", "--stop", "x")


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


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_how_keys_and_values_are_stored_can_be_said(
    command: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option reaches the cache; a name that there is not is refused before anything is loaded."""
    given: list[torch.dtype | None] = []
    new_cache = minilm.AutoModelForCausalLM.new_cache

    def counted(self: Any, rows: int = 0, *, dtype: torch.dtype | None = None) -> Any:
        given.append(dtype)
        return new_cache(self, rows, dtype=dtype)

    monkeypatch.setattr(minilm.AutoModelForCausalLM, "new_cache", counted)
    options = (command, "--model", model, "--max-tokens", "7", "--json", "where is tea")
    (usual,) = records(*options)
    (same,) = records(*options, "--kv-cache", "float32")
    assert same == usual
    (other,) = records(*options, "--kv-cache", "int8")
    assert len(other["token_ids"]) == 7
    assert given == [None, torch.float32, torch.int8]
    assert "'float32', 'float16', 'bfloat16', 'int8'" in failure(*options, "--kv-cache", "q4_0")


@pytest.mark.parametrize(
    ("run", "options", "expected"),
    [
        (Runtime(weights="int8"), {"conversing": True}, torch.float16),
        (Runtime(weights="int8"), {"conversing": False}, torch.float32),
        (Runtime(), {"conversing": True}, torch.float32),
        (Runtime(weights="int8"), {"conversing": True, "kv_cache": "float32"}, torch.float32),
        (Runtime(weights="int8"), {"conversing": True, "kv_cache": "auto"}, torch.float32),
        (Runtime(weights="int8", dtype="bfloat16"), {"conversing": True}, torch.bfloat16),
    ],
)
def test_a_conversation_with_quantised_weights_keeps_float16(
    run: Runtime, options: dict[str, Any], expected: torch.dtype, model: Path
) -> None:
    llm = _llm(str(model), "cpu", run, **{"kv_cache": None, **options})
    assert llm.kv_cache_dtype == expected
    assert llm._engine.cache.k_pages[0].dtype == expected
    (answer,) = llm.chat(question("where is tea"), greedy(7), use_tqdm=False)
    assert len(answer.outputs[0].token_ids) == 7


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
        self.params: list[minilm.SamplingParams] = []
        self.closed = 0
        typed = iter(lines)

        def read(prompt: str) -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)

    def __call__(self, messages: list[Message], params: minilm.SamplingParams) -> Any:
        self.asked.append([dict(message) for message in messages])
        self.params.append(params)
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

            @property
            def output(self) -> Any:
                reason = "length" if "chapter" in messages[-1]["content"] else "stop"
                return SimpleNamespace(outputs=[SimpleNamespace(finish_reason=reason)])

        return Pieces()


def test_a_conversation_remembers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(monkeypatch, "hello", "", "  who am i ", "/reset", "again", "/quit", "not read")
    Conversation(script, PARAMS, "be kind").run()
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
    Conversation(script, PARAMS).run()
    assert [messages[0]["content"] for messages in script.asked] == ["one", "in rhyme"]
    shown = capsys.readouterr().out
    assert "(no system message)" in shown
    assert "(in rhyme)" in shown
    assert "there is no command /what" in shown


def test_ctrl_c_stops_an_answer_which_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, "go on forever", "and now")
    Conversation(script, PARAMS).run()
    assert script.asked[1] == [
        {"role": "user", "content": "go on forever"},
        {"role": "assistant", "content": "FOREVER"},
        {"role": "user", "content": "and now"},
    ]
    assert script.closed == 2


def test_ctrl_c_twice_at_the_prompt_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, KeyboardInterrupt, "tea", KeyboardInterrupt, KeyboardInterrupt, "not read")
    with pytest.raises(KeyboardInterrupt):
        Conversation(script, PARAMS).run()
    assert len(script.asked) == 1


def test_a_question_that_cannot_be_answered_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(monkeypatch, "too long", "tea")
    Conversation(script, PARAMS).run()
    assert script.asked[1] == [{"role": "user", "content": "tea"}]
    assert "error: longer than the window" in capsys.readouterr().err


def test_an_answer_is_given_once_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(monkeypatch, "/retry", "one", "two", "/retry", "three")
    Conversation(script, PARAMS).run()
    assert [[m["content"] for m in asked] for asked in script.asked] == [
        ["one"],
        ["one", "ONE!", "two"],
        ["one", "ONE!", "two"],
        ["one", "ONE!", "two", "TWO!", "three"],
    ]
    assert "there is no question yet" in capsys.readouterr().out


def test_settings_change_from_the_next_answer_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (
        "/set temperature 0.25",
        "one",
        "/set top_k=9",
        "/set",
        "/set nonsense 3",
        "/set top_p 7",
        "two",
        "/set top_k x",
    )
    script = Script(monkeypatch, *lines)
    Conversation(script, PARAMS).run()
    assert [(p.temperature, p.top_k, p.top_p, p.max_tokens) for p in script.params] == [
        (0.25, 0, 1.0, 7),
        (0.25, 9, 1.0, 7),
    ]
    shown = capsys.readouterr().out
    assert "(temperature 0.25, top_k 9, max_tokens 7, seed None)" in shown
    assert "with NAME one of max_tokens, temperature" in shown
    assert "error: top_p must be above 0" in shown
    assert "error: invalid literal" in shown


def test_a_conversation_is_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    script = Script(monkeypatch, "größer", f"/save {file}", "/save", f"/save {tmp_path}")
    Conversation(script, PARAMS, "be kind").run()
    assert [m["content"] for m in json.loads(file.read_text("utf-8"))] == ["be kind", "größer", "GRÖSSER!"]
    shown = capsys.readouterr().out
    assert "(3 messages in " in shown
    assert "error: " in shown


def test_an_answer_that_was_cut_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(monkeypatch, "a whole chapter please", "thanks")
    Conversation(script, PARAMS).run()
    assert capsys.readouterr().out.count("(cut at 7 tokens: /set max_tokens N, or --max-tokens)") == 1


@pytest.mark.parametrize(
    ("stored", "given_options", "expected"),
    [
        ({}, {}, (0.7, 0.1, 1.1, 1.0)),
        ({}, {"temperature": 0.0}, (0.0, 0.1, 1.1, 1.0)),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.9}, {}, (0.2, 0.0, 1.0, 0.9)),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.9}, {"min_p": 0.3}, (0.2, 0.3, 1.0, 0.9)),
        ({"temperature": 0.2}, {}, (0.7, 0.1, 1.1, 1.0)),
    ],
    ids=["mild", "mild but greedy", "of the files", "of the files and given", "files that do not sample"],
)
def test_how_a_conversation_is_drawn(
    llm: minilm.LLM,
    monkeypatch: pytest.MonkeyPatch,
    stored: dict[str, Any],
    given_options: dict[str, Any],
    expected: tuple[float, ...],
) -> None:
    monkeypatch.setattr(llm.model, "generation_config", minilm.GenerationConfig(**stored))
    params = ChatSampling(**given_options).params(llm)
    assert (params.temperature, params.min_p, params.repetition_penalty, params.top_p) == expected
    assert params.max_tokens == 256


def test_one_question_gets_the_most_probable_tokens() -> None:
    assert ChatSampling().params().temperature == 0
    assert describe(ChatSampling().params()) == "temperature 0 (the most probable token)"


class Screen(StringIO):
    def isatty(self) -> bool:
        return True


@given(
    st.text(st.sampled_from("ab 東京\n😀-"), max_size=80),
    st.lists(st.integers(0, 80), max_size=12),
    st.integers(4, 12),
)
def test_words_are_not_broken(text: str, cuts: list[int], width: int) -> None:
    """However the pieces fall: the text but for white space at the ends of lines, and no line too wide."""
    screen = Screen()
    shown = Wrapped(screen, width)
    places = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    for begin, end in itertools.pairwise(places):
        shown.write(text[begin:end])
    shown.end()
    lines = screen.getvalue().split("\n")
    assert [line.split() for line in text.split("\n") if line.split()] == regrouped(lines, text)
    for line in lines:
        assert cell_len(line) <= width or len(line.split()) == 1


def regrouped(lines: list[str], text: str) -> list[list[str]]:
    """The words on the screen, in the lines that the text has."""
    words = iter([word for line in lines for word in line.split()])
    return [[next(words) for _ in line.split()] for line in text.split("\n") if line.split()]


def test_what_is_no_terminal_gets_the_text_as_it_is() -> None:
    file = StringIO()
    shown = Wrapped(file)
    for piece in ("a  long ", "line\tof many wor", "ds " * 60):
        shown.write(piece)
    shown.end()
    assert file.getvalue() == "a  long line\tof many words " + "ds " * 59 + "\n"


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    """With a real model, whose answers are long: Ctrl-C stops one, and the next question is answered."""
    model = save_chat_model(tmp_path, window=100_000)
    greedy_options = ("--temperature", "0", "--repetition-penalty", "1")  # never ends by itself
    options = ("--max-tokens", "90000", "--weights", "int8", *greedy_options)
    terminal = Terminal("chat", "--model", model, *options)
    terminal.wait_for("KV cache in float16")
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
    assert "error: a conversation cannot be written as JSON" in terminal.shown


@pytest.mark.slow
def test_the_default_model_answers() -> None:
    finished = process("chat", "What is the capital of France?", "--max-tokens", "20")
    assert finished.returncode == 0
    assert "Paris" in finished.stdout
    assert finished.stderr == ""


def test_the_backend_of_the_environment_is_used(model: Path) -> None:
    """MINILM_BACKEND holds for a process; --backend goes before it."""
    command = ("generate", "--model", model, "--max-tokens", "3", "--explain", "tea")
    environment = {**os.environ, "MINILM_BACKEND": "reference"}
    assert ": torch (" not in process(*command, env=environment).stderr
    assert ": torch (" in process(*command, "--backend", "torch,reference", env=environment).stderr
