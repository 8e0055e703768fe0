"""The heuristics as functions: powers of two, within the chip, and overruled by tables of measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

import torch

from minilm.kernels import heuristics, tuned
from minilm.kernels.candidates import candidates
from minilm.kernels.devices import CHIPS, INTERPRETER, assume, device_of

ROOT = Path(__file__).resolve().parents[2]
H100, A10 = CHIPS["sm_90"], CHIPS["sm_86"]
ATTENTION = ["attention_block", "attention_dq_block", "attention_dkdv_block"]


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table of the person's own, empty at first; call `tuned.reload()` after writing it."""
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("MINILM_TUNED", str(path))
    tuned.reload()
    yield path
    monkeypatch.undo()
    tuned.reload()


def entry(kernel: str, shape: dict[str, int], block: dict[str, int], device: Any = H100) -> dict[str, Any]:
    return {
        "device": device.name, "capability": list(device.capability), "kernel": kernel, "shape": shape,
        "block": block,
    }  # fmt: skip


def write(path: Path, *entries: dict[str, Any]) -> None:
    path.write_text(json.dumps({"version": 1, "entries": entries}))
    tuned.reload()


def power_of_2(n: int) -> bool:
    return n & (n - 1) == 0


@given(
    name=st.sampled_from(ATTENTION), head_dim=st.sampled_from([16, 32, 64, 80, 96, 128, 256]),
    itemsize=st.sampled_from([2, 4]), queries=st.integers(0, 5000), keys=st.integers(0, 5000),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()), chip=st.sampled_from(sorted(CHIPS)),
)  # fmt: skip
def test_attention_tiles_fit_every_chip(
    name: str,
    head_dim: int,
    itemsize: int,
    queries: int,
    keys: int,
    options: tuple[bool, bool, bool],
    chip: str,
) -> None:
    device = CHIPS[chip]
    options = options if name == "attention_block" else ()  # type: ignore[assignment]
    block = getattr(heuristics, name)(head_dim, itemsize, queries, keys, *options, device)
    assert all(map(power_of_2, (block.queries, block.keys, block.num_warps)))
    assert min(block.queries, block.keys) >= 16
    assert block.queries <= max(16, heuristics.next_power_of_2(max(queries, 1)))
    assert block.keys <= max(16, heuristics.next_power_of_2(max(keys, 1)))
    assert block.num_stages >= 1
    if name == "attention_block":
        needed = heuristics.attention_shared_memory(head_dim, itemsize, block, device, options[0])
        assert needed <= device.shared_memory


def test_the_formula_for_shared_memory_does_not_promise_too_much() -> None:
    """Beside what the compiler took in the committed compile report."""
    file = ROOT / "benchmarks" / "results" / "compile" / "report.json"
    rows = [r for r in json.loads(file.read_text())["rows"] if r["kernel"] == "attention"]
    forward = [r for r in rows if r["function"] == "_forward"]
    assert forward
    for row in forward:
        c = row["constants"]
        block = heuristics.AttentionBlock(c["BLOCK_M"], c["BLOCK_N"], row["num_warps"], row["num_stages"])
        itemsize = 4 if row["case"].endswith("fp32") else 2
        device = CHIPS[row["chip"]]
        needed = heuristics.attention_shared_memory(c["D"], itemsize, block, device, c["HAS_BIAS"])
        assert row["shared"] <= needed, f"{row['case']} on {row['chip']}"
    for row in rows:
        assert row["shared"] <= row["limit"]


def test_a_smaller_chip_gets_smaller_tiles() -> None:
    large = heuristics.attention_block(256, 2, 4096, 4096, False, False, False, H100)
    small = heuristics.attention_block(256, 2, 4096, 4096, False, False, False, A10)
    assert (large.queries, large.keys, large.num_stages) == (64, 64, 2)
    assert small.keys * small.num_stages < large.keys * large.num_stages
    assert heuristics.attention_shared_memory(256, 2, large, A10) > A10.shared_memory


def test_programs_go_with_the_processors() -> None:
    few, many = (H100._replace(processors=n) for n in (4, 400))
    assert heuristics.norm_block(384, 400, few).rows > heuristics.norm_block(384, 400, many).rows


def test_the_shipped_table_holds_nothing_that_was_not_measured() -> None:
    """No GPU has run the kernels: an entry without its figures, or for no tunable kernel, is invented."""
    for found in tuned.read_entries(tuned.SHIPPED):
        assert found["kernel"] in tuned.ALL
        assert found["seconds"] <= found["heuristic_seconds"]
        assert {"torch", "triton", "date", "problem"} <= set(found)
        tuned.ALL[found["kernel"]].block(found["block"])


def test_a_measured_configuration_comes_before_the_heuristic(own_table: Path) -> None:
    block = {"first": 256, "second": 128, "rows": 8, "num_warps": 2}
    write(own_table, entry("norm", {"columns": 384, "rows": 4096}, block))
    tuned_block = heuristics.NormBlock(**block)
    for rows in (2049, 4096):  # rounded up to a power of two
        assert heuristics.norm_block(384, rows, H100) == tuned_block
    for columns, rows, device in ((384, 4097, H100), (768, 4096, H100), (384, 4096, A10)):
        own = heuristics.norm_block.heuristic(columns, rows, device)
        assert heuristics.norm_block(columns, rows, device) == own != tuned_block
    twin = H100._replace(name="another of sm_90")
    assert heuristics.norm_block(384, 4096, twin) == tuned_block
    mine = block | {"num_warps": 8}
    write(
        own_table, entry("norm", {"columns": 384, "rows": 4096}, mine, twin),
        entry("norm", {"columns": 384, "rows": 4096}, block),
    )  # fmt: skip
    assert heuristics.norm_block(384, 4096, twin) == heuristics.NormBlock(**mine)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not JSON"),
        ("[]", "version None"),
        ('{"version": 2, "entries": []}', "version 2, and this minilm reads version 1"),
        ('{"version": 1, "entries": [{"kernel": "norm"}]}', "lacks block, capability, device, shape"),
    ],
)
def test_a_broken_table_is_named(own_table: Path, content: str, message: str) -> None:
    own_table.write_text(content)
    tuned.reload()
    with pytest.raises(tuned.TableError, match=message) as caught:
        heuristics.norm_block(384, 4096, H100)
    assert str(own_table) in str(caught.value)


def test_a_block_with_other_fields_is_refused(own_table: Path) -> None:
    write(own_table, entry("norm", {"columns": 384, "rows": 4096}, {"rows": 4}))
    with pytest.raises(tuned.TableError, match="must have first, second, rows, num_warps"):
        heuristics.norm_block(384, 4096, H100)


def test_no_table_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINILM_TUNED", "")
    assert tuned.own_path() is None
    monkeypatch.delenv("MINILM_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.own_path() == tmp_path / "minilm" / "tuned.json"


def test_what_is_asked_can_be_watched_and_forced() -> None:
    block = {"first": 1, "second": 2, "rows": 3, "num_warps": 4}
    with tuned.observed() as asked, tuned.forced("norm", block):
        assert heuristics.norm_block(100, 50, H100) == (1, 2, 3, 4)
    (question,) = asked
    assert question.kernel == "norm"
    assert question.sizes == {"columns": 100, "rows": 50}
    assert dict(question.shape) == {"columns": 100, "rows": 64}
    assert question.answer == heuristics.norm_block(100, 50, H100) != (1, 2, 3, 4)


def test_candidates_begin_with_the_heuristic_and_fit() -> None:
    sizes = {
        "head_dim": 64,
        "itemsize": 2,
        "max_queries": 40,
        "max_keys": 4096,
        "biased": 0,
        "dropout": 0,
        "windowed": 0,
    }
    answer = heuristics.attention_block(64, 2, 40, 4096, False, False, False, A10)
    found = candidates("attention", sizes, answer, A10)
    assert found[0] == answer
    assert len(found) == len(set(found)) > 10
    for block in found:
        assert heuristics.attention_shared_memory(64, 2, block, A10) <= A10.shared_memory
        assert block.queries <= 64
    roomy = candidates("attention", sizes, answer, H100)
    assert set(found) < set(roomy)


SIZES: dict[str, dict[str, int]] = {
    "norm": {"columns": 384, "rows": 4096},
    "norm_backward": {"columns": 384, "rows": 4096},
    "attention": {
        "head_dim": 64, "itemsize": 2, "max_queries": 512, "max_keys": 512, "biased": 0, "dropout": 0,
        "windowed": 0,
    },
    "attention_short": {
        "head_dim": 32, "itemsize": 2, "heads": 12, "sequences": 64, "max_queries": 128, "max_keys": 128,
    },
    "attention_dq": {"head_dim": 64, "itemsize": 2, "max_queries": 512, "max_keys": 512},
    "attention_dkdv": {"head_dim": 64, "itemsize": 2, "max_queries": 512, "max_keys": 512},
    "decode": {"head_dim": 128, "itemsize": 2, "int8": 0, "rows": 4},
    "decode_parts": {"head_dim": 128, "tiles": 8},
    "decode_combine": {"head_dim": 128},
    "rope": {"heads": 32, "head_dim": 128, "tokens": 512},
    "activation": {"columns": 1536},
    "activation_backward": {"columns": 1536},
    "cross_entropy": {"columns": 49152},
    "linear_cross_entropy": {"tokens": 4096, "vocabulary": 49152, "channels": 576, "itemsize": 2},
    "quantized_matmul": {"rows": 1, "outs": 4096, "ins": 4096, "itemsize": 2},
}  # fmt: skip
"""A call of every heuristic."""


@pytest.mark.parametrize("kernel", sorted(tuned.ALL))
def test_every_heuristic_has_candidates_and_yields_to_the_table(kernel: str, own_table: Path) -> None:
    heuristic, sizes = tuned.ALL[kernel], SIZES[kernel]
    own = heuristic(**sizes, device=H100)
    assert isinstance(own, tuple)
    first, *others = candidates(kernel, sizes, own, H100)
    assert first == own
    assert others, "nothing that `minilm tune` could try"
    assert own not in others
    with tuned.observed() as asked:
        heuristic(**sizes, device=H100)
    (question,) = asked
    write(own_table, entry(kernel, dict(question.shape), others[0]._asdict()))
    assert heuristic(**sizes, device=H100) == others[0]
    assert heuristic(**sizes, device=A10) == heuristic.heuristic(**sizes, device=A10)


def test_devices() -> None:
    assert device_of(torch.device("cpu")) == INTERPRETER
    with assume(A10):
        assert device_of(torch.device("cpu")) == A10
    assert device_of(torch.device("cpu")) == INTERPRETER
