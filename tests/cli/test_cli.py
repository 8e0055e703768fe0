"""The command line as a whole: help, input, output, errors, exit statuses; and the commands of encoders."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from cli_runs import Terminal, failure, process, records, run
from tiny_models import TEXTS, save_model

import minilm
from minilm.cli.app import app
from minilm.cli.results import quantity, size

GROUP: Any = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)
RUN_MODELS = ["chat", "classify", "embed", "fill-mask", "generate", "ner", "qa", "similar"]
RUN_MODELS += ["index", "search"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sentence encoder."""
    plain = save_model(tmp_path_factory.mktemp("plain"), "bert", spread=0.2)
    folder = tmp_path_factory.mktemp("encoder")
    minilm.SentenceEncoder(plain, device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def embedded(encoder: Path) -> Any:
    """TEXTS as `SentenceEncoder` embeds them."""
    return minilm.SentenceEncoder(encoder, device="cpu").encode(TEXTS)


# Help
def test_the_commands_are_these() -> None:
    others = ["tokenize", "inspect", "convert", "doctor", "bench", "quantize", "tune"]
    assert sorted([*RUN_MODELS, *others]) == COMMANDS


def test_version() -> None:
    line = f"minilm {minilm.__version__}\n"
    assert run("--version").stdout == line
    assert process("--version").stdout == line


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_describes_it_and_has_an_example_that_parses(name: str) -> None:
    text = run(name, "--help").stdout
    command = GROUP.commands[name]
    assert " ".join(command.help.split("\n\n")[0].split()) in " ".join(text.split())
    lines = [line for line in command.epilog.splitlines() if "minilm " in line]
    assert lines
    for line in lines:
        assert " ".join(line.split()) in " ".join(text.split())
        program, said, *arguments = minilm_part(line)
        assert (program, said) == ("minilm", name)
        command.make_context(name, arguments)


def minilm_part(line: str) -> list[str]:
    """The words of the command minilm in a line of the shell, without what is piped into it or redirected."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    part: list[str] = []
    for word in words:
        if word in ("|", ">"):
            if part[0] == "minilm":
                break
            part = []
        else:
            part.append(word)
    return part


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_all_commands_share(name: str) -> None:
    options = {option for parameter in GROUP.commands[name].params for option in parameter.opts}
    assert "--debug" in options
    if name in RUN_MODELS:
        assert options >= {"--model", "--device", "--dtype", "--backend", "--json", "--output"}


def test_nothing_asked_for_is_a_wish_for_help() -> None:
    shown = run().stdout
    assert "Usage: minilm [OPTIONS]" in shown
    assert all(name in shown for name in COMMANDS)


def test_help_needs_no_torch() -> None:
    code = "import sys; from minilm.cli import main; sys.argv = ['minilm', *sys.argv[1:]]\ntry: main()\n"
    code += "except SystemExit: print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    for arguments in (["--help"], ["embed", "--help"], ["--version"]):
        answer = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert answer.stdout.splitlines()[-1] == "[]"


# Input
def test_texts_from_everywhere_are_the_same(tmp_path: Path, encoder: Path) -> None:
    lines, objects = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    lines.write_text("\ufeff" + "\r\n".join(TEXTS), encoding="utf-8")
    objects.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS))
    command = ("embed", "--model", encoder)
    expected = run(*command, *TEXTS).stdout
    assert len(expected.splitlines()) == len(TEXTS)
    assert run(*command, stdin="\n".join(TEXTS)).stdout == expected
    assert run(*command, "-", stdin="\n".join(TEXTS) + "\n").stdout == expected
    assert run(*command, "--file", "-", stdin="\n".join(TEXTS)).stdout == expected
    assert run(*command, "--file", lines).stdout == expected
    assert run(*command, "--file", objects).stdout == expected
    half = "\n".join(TEXTS[2:])
    assert run(*command, *TEXTS[:2], "-", stdin=half).stdout == expected


def test_other_fields_of_json_lines_go_along(encoder: Path) -> None:
    given = [{"id": 7, "body": "tea", "tags": ["ü"]}, {"id": None, "body": "a book", "text": "other"}]
    lines = "\n".join(json.dumps(record) for record in given)
    found = records("embed", "--model", encoder, "--field", "body", stdin=lines)
    assert [(r["id"], r["body"], r["text"]) for r in found] == [(7, "tea", "tea"), (None, "a book", "a book")]
    assert found[0]["tags"] == ["ü"]


def test_empty_lines_are_skipped_with_a_warning(encoder: Path) -> None:
    result = run("embed", "--model", encoder, stdin="\ntea\n  \ngreen tea\n")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["tea", "green tea"]
    assert result.stderr == "warning: standard input: 2 empty lines were skipped\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"tea\n\xff\xfe\n", "not UTF-8"),
        (b"", "there is no text in"),
        (b"\n\n", "there is no text in"),
    ],
)
def test_bad_text_files(tmp_path: Path, encoder: Path, content: bytes, message: str) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(content)
    result = run("embed", "--model", encoder, "--file", file, status=2)
    assert f"{file}" in result.stderr
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "tea"', "line 2 is not JSON"),
        ('["tea"]', "line 2 is not a JSON object, but list"),
        ('{"body": "tea", "id": 1}', "no text in the field 'text'; it has body, id"),
        ('{"text": 3}', "no text in the field 'text'; it holds int there"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_bad_json_lines(tmp_path: Path, encoder: Path, line: str, message: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(f'{{"text": "tea"}}\n{line}\n')
    result = run("tokenize", "--model", encoder, "--file", file, status=2)
    assert f"error: {file}: " in result.stderr
    assert message in result.stderr


def test_files_that_are_not_there(tmp_path: Path, encoder: Path) -> None:
    assert "nothing.txt: No such file" in failure("embed", "-m", encoder, "--file", tmp_path / "nothing.txt")
    assert "Is a directory" in failure("embed", "-m", encoder, "--file", tmp_path)
    assert "no text in standard input" in failure("embed", "-m", encoder)


# Output
def test_embeddings_are_those_of_the_library(tmp_path: Path, encoder: Path, embedded: Any) -> None:
    found = records("embed", "--model", encoder, *TEXTS)
    assert [record["text"] for record in found] == TEXTS
    numbers = np.array([record["embedding"] for record in found], dtype=np.float32)
    np.testing.assert_array_equal(numbers, embedded)  # the digits are enough to say which float32 it was
    for name in ("out.npy", "out.jsonl"):
        result = run("embed", "--model", encoder, *TEXTS, "--output", tmp_path / name)
        assert result.stdout == ""
    array = np.load(tmp_path / "out.npy")
    assert (array.shape, array.dtype) == ((len(TEXTS), 24), np.float32)
    np.testing.assert_array_equal(array, embedded)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.npy"]


def test_options_of_embed(encoder: Path, embedded: Any) -> None:
    scaled = records("embed", "--model", encoder, "--normalize", "--batch-size", "2", *TEXTS)
    expected = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    np.testing.assert_allclose([record["embedding"] for record in scaled], expected, atol=1e-6)
    (prompted,) = records("embed", "--model", encoder, "--prompt", "the red ", "book")
    (plain,) = records("embed", "--model", encoder, "the red book")
    assert prompted["text"] == "book"
    assert prompted["embedding"] == plain["embedding"]
    (half,) = records("embed", "--model", encoder, "--dtype", "bfloat16", TEXTS[0])
    assert 0 < np.abs(np.array(half["embedding"]) - embedded[0]).max() < 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.csv", "ends in .jsonl or .npy"),
        ("out", "ends in .jsonl or .npy"),
        ("nowhere/out.npy", "does not exist"),
        ("folder.npy", "this is a folder"),
    ],
)
def test_outputs_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.npy").mkdir()
    assert message in failure("embed", "tea", "--output", tmp_path / name)


def test_only_arrays_make_npy(tmp_path: Path) -> None:
    assert "no arrays for .npy" in failure("similar", "tea", "water", "--output", tmp_path / "out.npy")


def test_a_failure_leaves_the_output_as_it_was(tmp_path: Path, encoder: Path) -> None:
    out, broken = tmp_path / "out.jsonl", tmp_path / "broken.jsonl"
    out.write_text("before")
    broken.write_text('{"text": "tea"}\n' * 2000 + "{\n")  # the error comes after the first results
    failure("embed", "--model", encoder, "--file", broken, "--output", out)
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "out.jsonl"]


def test_similar_ranks(tmp_path: Path, encoder: Path) -> None:
    model = minilm.SentenceEncoder(encoder, device="cpu")
    scores = model.similarity(model.encode(["where is tea"]), model.encode(TEXTS))[0]
    order = scores.argsort(descending=True).tolist()
    found = records("similar", "where is tea", *TEXTS, "--model", encoder)
    assert [record["text"] for record in found] == [TEXTS[i] for i in order]
    assert [record["rank"] for record in found] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([r["score"] for r in found], scores[order], atol=1e-6)
    assert records("similar", "where is tea", "-k", "2", "-m", encoder, stdin="\n".join(TEXTS)) == found[:2]
    assert "the query is empty" in failure("similar", " ", "tea", "-m", encoder)


def test_the_default_model_is_real() -> None:
    found = records("similar", "Who eats?", "The sky is blue.", "A man is eating food.", "Nobody.")
    assert found[0]["text"] == "A man is eating food."
    (record,) = records("embed", "tea")
    assert len(record["embedding"]) == 384
    assert np.linalg.norm(record["embedding"]) == pytest.approx(1.0, abs=1e-5)


def test_tables_on_a_terminal(encoder: Path) -> None:
    terminal = Terminal("embed", "--model", encoder, *TEXTS)
    assert terminal.finish() == 0
    lines = [line.rstrip() for line in terminal.shown.splitlines() if line.strip()]
    assert all(len(line) <= 80 for line in lines)
    rows = [line for line in lines if re.search(r" 24 +\d+\.\d{3}  [+-]\d", line)]
    assert len(rows) == len(TEXTS)
    assert "{" not in terminal.shown
    terminal = Terminal("embed", "--model", encoder, "--json", "tea")
    assert terminal.finish() == 0
    assert json.loads(terminal.shown.splitlines()[-1])["text"] == "tea"


# Where it runs
def test_explain_tells_what_ran(encoder: Path) -> None:
    result = run("embed", "--model", encoder, "--backend", "reference", "--explain", "tea")
    assert "linear: reference (" in result.stderr
    assert "native (" not in result.stderr
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "torch"), "there is no torch implementation of"),
        (("--backend", "cudnn"), "unknown backend 'cudnn'; expected one of native"),
        (("--device", "tpu9"), "--device tpu9: "),
        (("--dtype", "int8"), "dtype must be a floating-point dtype"),
        (("--batch-size", "0"), "--batch-size"),
        (("--normalise",), "No such option"),
    ],
)
def test_options_that_cannot_be(encoder: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in failure("embed", "--model", encoder, *arguments, "tea")


def test_no_gpu_is_an_error_when_it_is_asked_for(encoder: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "sees no CUDA device" in failure("embed", "--model", encoder, "--device", "cuda", "tea")


# Errors
def test_errors_are_one_line_and_status_2() -> None:
    for arguments in (
        ("embed", "--model", "no/such/model/anywhere", "tea"),
        ("inspect", "no-such-model-of-ours"),
        ("unknown-command",),
        ("similar",),
    ):
        finished = process(*arguments)
        assert (finished.returncode, finished.stdout) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", finished.stderr), finished.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    for arguments in (("--debug", "inspect", tmp_path), ("inspect", tmp_path, "--debug")):
        finished = process(*arguments)
        assert finished.returncode == 2
        assert "Traceback (most recent call last)" in finished.stderr
        assert "ConfigError" in finished.stderr
        assert finished.stderr.splitlines()[-1].startswith("error: ")


def test_a_fault_of_the_program_asks_for_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("layers")

    monkeypatch.setattr("minilm.conversion.summarise", broken)
    message = failure("inspect", status=1)
    assert message == (
        "error: unexpected KeyError: 'layers' (a bug in minilm: run again with --debug for the traceback)"
    )
    assert "Traceback" in run("inspect", "--debug", status=1).stderr


def test_no_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):

        def exhausted(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("minilm.conversion.summarise", exhausted)
        assert "memory" in failure("inspect")


def test_a_closed_pipe_is_quiet(tmp_path: Path, encoder: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("tea\n" * 20_000)
    command = f"{shlex.quote(sys.executable)} -m minilm tokenize --model {encoder} --file {file} | head -1"
    finished = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=600
    )
    first, status = finished.stdout.splitlines()
    assert json.loads(first)["text"] == "tea"
    assert status == "141"
    assert finished.stderr == ""


def test_ctrl_c_ends_with_130(encoder: Path) -> None:
    command = [sys.executable, "-m", "minilm", "embed", "--model", str(encoder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write("tea\n" * 1024)
        child.stdin.flush()
        assert "embedding" in child.stdout.readline()  # it works, and waits for more
        child.send_signal(signal.SIGINT)
        assert child.wait(600) == 130
        assert "Traceback" not in child.stderr.read()


def test_warnings_are_one_line(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "surprise_layers": 3}))
    result = run("embed", "--model", folder, "tea")
    assert result.stderr.count("\n") == len(re.findall("^warning: ", result.stderr, re.M)) >= 1
    assert "surprise_layers" in result.stderr


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (90_868_376, "90.9 MB"),
        (999_600, "1 MB"),
        (5 * 10**12, "5 TB"),
    ],
)
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(7, "7"), (22_713_216, "22.7 M"), (134_515_008, "135 M"), (1500, "1.5 k")]
)
def test_quantities(count: int, shown: str) -> None:
    assert quantity(count) == shown
