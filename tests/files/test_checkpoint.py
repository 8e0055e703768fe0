"""Files of weights: reading in pieces, shards, indexes, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from small_family import (
    C,
    V,
    damaged,
    expected,
    fails,
    load,
    on_meta,
    stored,
    write,
)
from torch import Tensor

from minilm.files.checkpoint import WeightError
from minilm.files.opening import open_checkpoint
from minilm.files.safetensors import SafetensorsCheckpoint, blocks


@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    final=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    shape=st.lists(st.integers(1, 9), max_size=4),
    window=st.integers(16, 200),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_reading_in_pieces_is_reading(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    final: torch.dtype,
    shape: list[int],
    window: int,
    seed: int,
) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    path = tmp_path_factory.mktemp("pieces") / "x.safetensors"
    save_file({"other": torch.ones(3, dtype=torch.uint8), "x": value}, path)
    checkpoint = SafetensorsCheckpoint(path)
    checkpoint._window = window
    plain = torch.empty(shape, dtype=final)
    checkpoint.read_into("x", plain)
    assert torch.equal(plain, value.to(final))
    strided = torch.empty(shape[::-1], dtype=final).permute(tuple(range(len(shape)))[::-1])
    checkpoint.read_into("x", strided)
    assert torch.equal(strided, value.to(final))


@given(st.lists(st.integers(1, 12), max_size=4), st.integers(1, 40))
@example([10, 4], 12)
def test_blocks_cover_everything_once(shape: list[int], limit: int) -> None:
    count = torch.zeros(shape, dtype=torch.int64)
    for index in blocks(shape, limit):
        assert count[index].numel() <= limit
        count[index] += 1
    assert bool((count == 1).all())


def write_shards(folder: Path, *shards: dict[str, Tensor], weight_map: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    places = {}
    for number, shard in enumerate(shards):
        file = f"part-{number}.safetensors"
        save_file(shard, folder / file)
        places |= dict.fromkeys(shard, file)
    index = {"weight_map": places if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def halves() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tensors = list(stored().items())
    return dict(tensors[:9]), dict(tensors[9:])


def test_shards_load(tmp_path: Path) -> None:
    one, two = halves()
    model = on_meta()
    load(write_shards(tmp_path / "m", one, two), model)
    for name, value in expected(one | two).items():
        assert torch.equal(model.get_parameter(name), value)


def test_shards_behind_links_load(tmp_path: Path) -> None:
    """As in the cache of the hub, where a folder of links points to files under other names elsewhere."""
    folder = write_shards(tmp_path / "m", *halves())
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        os.rename(file, tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..", "blobs", str(number)))
    load(folder, on_meta())


def test_error_names_the_shard(tmp_path: Path) -> None:
    one, two = halves()
    fails(
        write_shards(tmp_path / "m", one, two | {"h.9.x": torch.ones(1)}),
        on_meta(),
        "h.9.x in part-1.safetensors",
    )


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", *halves())
    (folder / "part-1.safetensors").unlink()
    fails(folder, on_meta(), "model.safetensors.index.json: the shard part-1.safetensors is missing")


def test_index_names_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    one, two = halves()
    places = dict.fromkeys(one, "part-0.safetensors") | dict.fromkeys(two, "part-1.safetensors")
    folder = write_shards(tmp_path / "m", one, two, weight_map=places | {"h.7.a": "part-1.safetensors"})
    fails(folder, on_meta(), "part-1.safetensors: h.7.a is missing, which model.safetensors.index.json says")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    one, two = halves()
    folder = write_shards(tmp_path / "m", one, two | {"emb.weight": torch.ones(V, C)})
    fails(folder, on_meta(), "emb.weight is also in part-")


def test_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    one, two = halves()
    places = dict.fromkeys(one, "part-0.safetensors") | dict.fromkeys(two, "part-1.safetensors")
    del places["h.1.b"]
    folder = write_shards(tmp_path / "m", one, two, weight_map=places)
    fails(
        folder,
        on_meta(),
        "part-1.safetensors: h.1.b is in this file, but model.safetensors.index.json does not",
    )


@pytest.mark.parametrize(
    "file",
    [
        "../m2/part-0.safetensors",
        "/etc/part-0.safetensors",
        "a/../../x.safetensors",
        "a\\..\\x.safetensors",
        "x.bin",
        "",
        "x\0.safetensors",
        3,
        None,
        ["x.safetensors"],
    ],
)
def test_index_that_leads_elsewhere(tmp_path: Path, file: Any) -> None:
    write_shards(tmp_path / "m2", stored())
    folder = write_shards(tmp_path / "m", weight_map=dict.fromkeys(stored(), file))
    fails(folder, on_meta(), "model.safetensors.index.json", repr(file))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff", '{"a": 1e999}'],
)
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightError, match=r"model\.safetensors\.index\.json: (not|nested|expected a) "):
        open_checkpoint(tmp_path)


def test_single_file_comes_before_an_index(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", {"a": torch.ones(1)})
    write(folder, {"b": torch.ones(1)})
    assert open_checkpoint(folder).tensors.keys() == {"b"}
    assert open_checkpoint(folder / "model.safetensors.index.json").tensors.keys() == {"a"}
    assert open_checkpoint(folder / "part-0.safetensors").tensors.keys() == {"a"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "x.ckpt"])
def test_pickle_is_never_read(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(WeightError, match=rf"{name}: this is a pickle.*save_pretrained"):
            open_checkpoint(path)
    os.rename(tmp_path / name, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match="not a valid safetensors file"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(WeightError, match=r"no weights here: expected model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(WeightError, match=r"x\.txt: expected a \.safetensors"):
        open_checkpoint(tmp_path / "x.txt")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightError, match=r"2 GGUF files, name one of them: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    )
    with pytest.raises(WeightError, match="Git LFS pointer"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(WeightError, match=r"\.safetensors"):
        open_checkpoint(tmp_path / "model.safetensors" / "model.safetensors")


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with open_checkpoint(write(tmp_path / "m", stored())) as checkpoint:
        with pytest.raises(WeightError, match="there is no tensor 'x'"):
            checkpoint.read_into("x", torch.empty(1))
        with pytest.raises(WeightError, match=r"emb\.weight has shape \[11, 6\], not \[6, 11\]"):
            checkpoint.read_into("emb.weight", torch.empty(C, V))


def test_file_cut_after_opening(tmp_path: Path) -> None:
    path = write(tmp_path / "m", stored()) / "model.safetensors"
    checkpoint = open_checkpoint(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightError, match=r"model\.safetensors: .* cannot be read"):
        checkpoint.read_into("h.1.q.weight", torch.empty(C, C))


SMALL = save({name: tensor.to(torch.bfloat16) for name, tensor in stored(layers=1).items()}, {"format": "pt"})
HEADER = 8 + int.from_bytes(SMALL[:8], "little")


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
@given(st.data())
@settings(deadline=None, max_examples=400)
def test_damaged_file_is_an_error_or_loads(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(damaged(SMALL, draw, HEADER))
    model = on_meta(layers=1)
    message = None
    try:
        load(path, model)
    except WeightError as error:
        message = str(error)
    assert message is None or str(path) in message
    assert [parameter.is_meta for parameter in model.parameters()].count(message is None) == 0


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1]}}',
        '{"a":7}',
        "[]",
        "",
        '{"a":' * 3000,
    ],
)
def test_hostile_headers(tmp_path: Path, header: str) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    fails(path, on_meta(), "")


def test_header_that_claims_to_be_huge(tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    for size in (2**63 - 1, 2**64 - 1, 2**40, 99_999_999, 3):
        path.write_bytes(size.to_bytes(8, "little") + b'{"a":1}')
        fails(path, on_meta(), "not a valid safetensors file")
