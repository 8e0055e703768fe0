"""What is read is a regular file of a sane size and sense; anything else is an error that names it."""

from __future__ import annotations

import os
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_model
from tokenizer_folders import byte_level, gpt2, wordpiece

import minilm
from minilm.files import FileError, has_file, read_bytes, read_json, read_json_value, read_text
from minilm.sentence import SentenceEncoder


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # names of sockets have 108 bytes at most
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


def sparse(path: Path) -> None:
    with open(path, "wb") as stream:
        stream.truncate(1 << 41)


IN_ITS_PLACE: dict[str, Any] = {
    "dangling": (lambda path: path.symlink_to("nowhere"), "a broken link to nowhere"),
    "loop": (lambda path: path.symlink_to(path.name), "cannot be read: .*links"),
    "directory": (lambda path: path.mkdir(), "expected a file, and this is a directory"),
    "pipe": (fifo, "expected a file, and this is a named pipe"),
    "socket": (unix_socket, "expected a file, and this is a socket"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "expected a file, and this is a character device"),
    "sparse": (sparse, "2199023255552 bytes are too many"),
}


@pytest.mark.parametrize("kind", IN_ITS_PLACE)
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    make, message = IN_ITS_PLACE[kind]
    make(tmp_path / "x.json")
    for read in (has_file, read_json, read_text, lambda path: read_bytes(path, limit=10)):
        if read is has_file and kind == "sparse":
            continue
        with pytest.raises(FileError, match=rf"x\.json: {message}"):
            read(tmp_path / "x.json")
    assert not has_file(tmp_path / "y.json")
    assert not has_file(tmp_path / "y" / "z.json")


def test_links_to_files_are_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{}")
    (tmp_path / "y").symlink_to("x")
    assert has_file(tmp_path / "y")
    assert read_json(tmp_path / "y") == {}


MODEL = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
SENTENCE = [
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
]


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentence")
    model = SentenceEncoder(save_model(folder / "backbone", "bert"), device="cpu")
    model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("kind", [kind for kind in IN_ITS_PLACE if kind not in ("sparse", "loop")])
@pytest.mark.parametrize("name", [*MODEL, *SENTENCE])
def test_every_file_of_a_sentence_model(tmp_path: Path, sentence_model: Path, name: str, kind: str) -> None:
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(sentence_model, folder)
    (folder / name).unlink()
    IN_ITS_PLACE[kind][0](folder / name)
    with pytest.raises((ValueError, OSError), match=Path(name).name):
        SentenceEncoder(folder, device="cpu")


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["dangling", "directory", "pipe"])
def test_files_of_a_decoder(tmp_path: Path, name: str, kind: str) -> None:
    config = minilm.AutoConfig.for_model(
        "llama", vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    minilm.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m", max_shard_size="300")
    (tmp_path / "m" / name).unlink(missing_ok=True)
    IN_ITS_PLACE[kind][0](tmp_path / "m" / name)
    with pytest.raises(ValueError, match=name):
        minilm.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("kind", ["dangling", "directory", "pipe", "endless"])
def test_files_of_tokenizers(tmp_path: Path, kind: str) -> None:
    import shutil

    folders = [
        (wordpiece(), "vocab.txt"),
        (gpt2(), "merges.txt"),
        (byte_level("gpt2", []), "vocab.json"),
        (wordpiece(), "special_tokens_map.json"),
        (wordpiece(), "chat_template.jinja"),
    ]
    for number, (source, name) in enumerate(folders):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        (folder / name).unlink(missing_ok=True)
        IN_ITS_PLACE[kind][0](folder / name)
        with pytest.raises(ValueError, match=name):
            minilm.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"b": {"a": 1, "a": true}}', "'a' is there twice"),
        ('{"a": NaN}', "NaN is not allowed in JSON"),
        ('{"a": [-Infinity]}', "-Infinity is not allowed"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ('{"a": ' + "[" * 50_000, "nested too deeply"),
    ],
)
def test_json_that_readers_take_differently(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FileError, match=message):
        read_json_value(tmp_path / "x.json")


def test_the_same_key_with_the_same_value(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [1, 2.5], "a": [1, 2.5]}')
    assert read_json_value(tmp_path / "x.json") == {"a": [1, 2.5]}


def test_a_pipe_as_weights_or_gguf(tmp_path: Path) -> None:
    for name in ("a.gguf", "a.safetensors"):
        fifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: expected a file, and this is a named pipe"):
            minilm.files.open_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.gguf"):
        minilm.AutoTokenizer.from_pretrained(tmp_path / "a.gguf")
    with pytest.raises((ValueError, OSError), match=r"a\.gguf"):
        minilm.AutoModelForCausalLM.from_pretrained(tmp_path / "a.gguf")


def test_memory_is_that_of_the_file_and_not_of_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"hidden_size": 8}')
    tracemalloc.start()
    try:
        assert read_json(file, limit=1 << 30) == {"hidden_size": 8}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
