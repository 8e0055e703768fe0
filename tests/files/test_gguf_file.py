"""The GGUF container: metadata, and damaged and hostile files."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf_files import (
    SMALL,
    Type,
    blocks_of,
    read,
    small,
    small_tensors,
    write_gguf,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_family import damaged

from minilm.files.checkpoint import WeightError
from minilm.files.gguf import GGUFCheckpoint, read_gguf_metadata


def test_another_alignment(tmp_path: Path) -> None:
    tensors = small_tensors()
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(256)
    for key, value in SMALL.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFCheckpoint(tmp_path / "x.gguf") as checkpoint:
        found = read(checkpoint, "model.layers.0.mlp.down_proj.weight").numpy()
    assert np.array_equal(found, tensors["blk.0.ffn_down.weight"])


def test_metadata_of_every_type(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "anything at all")
    numbers = {
        "uint8": 200,
        "int8": -100,
        "uint16": 60000,
        "int16": -30000,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.25,
        "float64": 0.1,
        "bool": False,
        "string": "ß\0x",
    }
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    lists: dict[str, list[Any]] = {"s": ["a", "", "日本"], "i": [1, -2], "f": [0.5, 1.5], "b": [True, False]}
    for key, values in lists.items():
        writer.add_array(f"list.{key}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf_metadata(tmp_path / "x.gguf")
    assert found.pop("general.architecture") == "anything at all"
    want = {f"a.{kind}": value for kind, value in numbers.items()} | {
        f"list.{k}": v for k, v in lists.items()
    }
    assert found == want
    assert all(type(found[key]) is type(value) for key, value in want.items())


HEAD = b"GGUF" + struct.pack("<I", 3)
ONE, TWO = HEAD + struct.pack("<QQ", 0, 1), HEAD + struct.pack("<QQ", 0, 2)  # entries of metadata


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends early"),
        (b"GGML" + bytes(60), "starts with b'GGML'"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "version 1 is not supported"),
        (HEAD + struct.pack("<QQ", 2**60, 0) + bytes(99), "1152921504606846976 tensors cannot be in the"),
        (HEAD + struct.pack("<QQ", 0, 2**63) + bytes(99), "metadata entries cannot be in the"),
        (HEAD + struct.pack("<QQQ", 0, 1, 2**62) + bytes(99), "ends early"),
        (ONE + text("k") + struct.pack("<IIQ", 9, 8, 2**59) + bytes(99), "strings cannot be in the"),
        (ONE + text("k") + struct.pack("<IIQ", 9, 0, 2**40) + bytes(99), "numbers cannot be in the"),
        (ONE + text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(99), "type 9 of metadata is not supported"),
        (ONE + text("k") + struct.pack("<I", 77) + bytes(99), "type 77 of metadata is not supported"),
        (ONE + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(99), "not UTF-8"),
        (TWO + 2 * (text("k") + struct.pack("<IB", 0, 1)) + bytes(99), "'k' is there twice"),
    ],
)
def test_hostile_headers(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    for reader in (read_gguf_metadata, GGUFCheckpoint):
        tracemalloc.start()
        with pytest.raises(WeightError, match=message) as caught:
            reader(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()
        assert str(path) in str(caught.value)


def tensor_line(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([tensor_line("t", (2**31, 2**31), 0, 0)], "truncated: the data of t ends at byte"),
        ([tensor_line("t", (8,), 0, 2**63)], "the data of t are at byte"),
        ([tensor_line("t", (8,), 0, 8)], "the data of t are at byte 136, expected 128"),
        (
            [tensor_line("t", (8,), 0, 0), tensor_line("u", (8,), 0, 0)],
            "the data of u are at byte 160, expected 192",
        ),
        ([tensor_line("t", (8,), 0, 0), tensor_line("t", (8,), 0, 32)], "tensor t is there twice"),
        ([tensor_line("t", (8, 0), 0, 0)], r"t of shape \[0, 8\] cannot be F32"),
        ([tensor_line("t", (33,), 2, 0)], r"t of shape \[33\] cannot be Q4_0, in blocks of 32"),
        ([tensor_line("t", (8,), 999, 0)], "t is stored in the unknown type 999"),
        ([tensor_line("t", (1,) * 5, 0, 0)], "t has 5 dimensions"),
        ([tensor_line("t", (), 0, 0)], "t has 0 dimensions"),
        ([text("t") + struct.pack("<I", 2**32 - 1)], "t has 4294967295 dimensions"),
    ],
)
def test_hostile_tables(tmp_path: Path, lines: list[bytes], message: str) -> None:
    path = tmp_path / "hostile.gguf"
    metadata = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    path.write_bytes(HEAD + struct.pack("<QQ", len(lines), 1) + metadata + b"".join(lines) + bytes(200))
    with pytest.raises(WeightError, match=message):
        GGUFCheckpoint(path)
    assert read_gguf_metadata(path) == {"general.architecture": "llama"}


def test_truncated(tmp_path: Path) -> None:
    path = small(tmp_path / "x.gguf")
    data = path.read_bytes()
    checkpoint = GGUFCheckpoint(path)
    path.write_bytes(data[:-40])  # the last of the data; the writer pads to 32
    with pytest.raises(WeightError, match=r"x\.gguf: truncated: the data of .* ends at byte"):
        GGUFCheckpoint(path)
    last = list(checkpoint.tensors)[-1]
    with pytest.raises(WeightError, match="has been cut while it was open"):
        read(checkpoint, last)
    with pytest.raises(WeightError, match="no such file"):
        GGUFCheckpoint(tmp_path / "nowhere.gguf")
    with pytest.raises(WeightError, match="expected a file, and this is a directory"):
        read_gguf_metadata(tmp_path)


def read_all(path: Path) -> None:
    with GGUFCheckpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            read(checkpoint, name)
        checkpoint.hf_config()


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A small file without fault, and how much of it is header."""
    quantised = (blocks_of(Type.Q4_1, 12, 1, 5), Type.Q4_1)
    tensors = {"blk.0.ffn_up.weight": quantised, "rope_freqs.weight": np.full(2, 4, np.float32)}
    path = small(tmp_path_factory.mktemp("gguf") / "x.gguf", tensors)
    read_all(path)
    data = path.read_bytes()
    return data, data.index(b"rope_freqs") + 40


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(st.data())
@settings(deadline=None, max_examples=400)
def test_damaged_file_is_an_error_or_loads(
    tmp_path_factory: pytest.TempPathFactory, sound_file: tuple[bytes, int], draw: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged(sound_file[0], draw, sound_file[1]))
    message = str(path)
    try:
        read_all(path)
    except WeightError as error:
        message = str(error)
    assert str(path) in message


def table_of(data: bytes) -> dict[str, tuple[int, int]]:
    """Where in a file the type of each tensor is written, and how many bytes its data have; read by the
    package of llama.cpp, and by looking for the name."""
    from gguf import GGUFReader

    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"table-{os.getpid()}.gguf"
    path.write_bytes(data)
    try:
        reader = GGUFReader(path)
        found = {}
        for tensor in reader.tensors:
            at = data.index(text(tensor.name)) + 8 + len(tensor.name) + 4 + 8 * len(tensor.shape)
            assert struct.unpack_from("<I", data, at)[0] == tensor.tensor_type
            found[str(tensor.name)] = (at, int(tensor.n_bytes))
    finally:
        path.unlink()
    return found


def test_a_wrong_type_is_seen_wherever_it_has_another_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    tensors = {
        name: rng.normal(size=value.shape).astype(np.float32) + 3 for name, value in small_tensors().items()
    }
    path = write_gguf(tmp_path / "x.gguf", "llama", tensors, SMALL)
    data = path.read_bytes()
    read_all(path)
    changed = 0
    for at, nbytes in table_of(data).values():
        for kind in Type:
            block, size = GGML_QUANT_SIZES[kind]
            elements = nbytes // 4
            if kind is Type.F32 or (elements % block == 0 and elements // block * size == nbytes):
                continue
            path.write_bytes(data[:at] + struct.pack("<I", kind) + data[at + 4 :])
            with pytest.raises(WeightError, match=r"x\.gguf"):
                read_all(path)
            changed += 1
        dimension = at - 8
        for more in (-1, 1, 2):
            value = struct.unpack_from("<Q", data, dimension)[0] + more
            path.write_bytes(data[:dimension] + struct.pack("<Q", value) + data[dimension + 8 :])
            with pytest.raises(WeightError, match=r"x\.gguf"):
                read_all(path)
        for more in (-32, 32, 1, 2**40):
            value = struct.unpack_from("<Q", data, at + 4)[0] + more
            path.write_bytes(data[: at + 4] + struct.pack("<Q", value % 2**64) + data[at + 12 :])
            with pytest.raises(WeightError, match=r"x\.gguf"):
                read_all(path)
    assert changed > 100
    path.write_bytes(data + bytes(32))
    with pytest.raises(WeightError, match="or something else follows"):
        read_all(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.tokens": ["a"] * 6}, "5 rows, and tokenizer.ggml.tokens 6"),
        ({"tokenizer.ggml.tokens": ["a"] * 4}, "5 rows, and tokenizer.ggml.tokens 4"),
        ({"tokenizer.ggml.tokens": "abcde"}, "5 rows, and tokenizer.ggml.tokens 'abcde'"),
        ({"tokenizer.ggml.scores": [0.5] * 4}, "5 rows, and tokenizer.ggml.scores 4"),
        ({"tokenizer.ggml.token_type": [1] * 7}, "5 rows, and tokenizer.ggml.token_type 7"),
        ({"tokenizer.ggml.eos_token_id": 5}, "eos_token_id: got 5, expected a number below 5"),
        ({"tokenizer.ggml.bos_token_id": "1"}, "bos_token_id: got '1'"),
        ({"llama.vocab_size": 6}, "5 rows, and metadata llama.vocab_size is 6"),
        ({"llama.block_count": 2}, "block_count is 2, but there are 1 layers"),
        ({"llama.block_count": 1.0}, "block_count: expected a whole number"),
    ],
)
def test_counts_that_disagree_with_the_tensors(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "x", "llama", small_tensors(), SMALL | metadata)
    with GGUFCheckpoint(path) as checkpoint, pytest.raises(WeightError, match=message):
        checkpoint.hf_config()
