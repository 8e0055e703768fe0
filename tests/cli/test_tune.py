"""`minilm tune`: from the calls of heuristics to the table of block sizes, with a simulated clock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cli_runs
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from minilm import ops
from minilm.benchmarks import check
from minilm.benchmarks import tune as tuning
from minilm.benchmarks.ops import make_inputs, with_written
from minilm.kernels import heuristics, tuned
from minilm.kernels.devices import CHIPS, INTERPRETER

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The person's table, not there yet; models in toy sizes."""
    path = tmp_path / "folder" / "tuned.json"
    monkeypatch.setenv("MINILM_TUNED", str(path))
    monkeypatch.setenv("MINILM_BENCH_TINY", "1")
    tuned.reload()
    yield path
    monkeypatch.undo()
    tuned.reload()


def clock(seconds: Callable[[Any], float], log: list[Any]) -> tuning.Timer:
    """A timer that runs the call once, and makes up its time from the block that norm was run with."""

    def timer(call: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
        call(inputs[0])
        block = heuristics.norm_block(64, 40, INTERPRETER)
        log.append(block)
        return seconds(block)

    return timer


def tuner(seconds: Callable[[Any], float], log: list[Any], **options: Any) -> tuning.Tuner:
    options = {"most": 6, "say": lambda line: None, **options}
    return tuning.Tuner(torch.float32, "cpu", timer=clock(seconds, log), **options)


def test_the_fastest_right_block_becomes_an_entry_that_is_then_used(table: Path) -> None:
    timed: list[Any] = []
    asked = tuning.tune(
        ["MiniLM-L6"], ["norm"],
        tuner(lambda block: 1e-6 if block.rows == 2 else 2e-6, timed),
        lambda entry: tuning.add_entry(table, entry),
    )  # fmt: skip
    entries = tuned.read_entries(table)
    assert asked >= len(entries) > 0
    assert len(set(timed)) > 2
    for entry in entries:
        assert entry["kernel"] == "norm"
        assert entry["device"] == INTERPRETER.name
        assert entry["block"]["rows"] == 2 != entry["heuristic"]["rows"]
        assert (entry["seconds"], entry["heuristic_seconds"]) == (1e-6, 2e-6)
        sizes = entry["shape"]
        now = heuristics.norm_block(sizes["columns"], sizes["rows"], INTERPRETER)
        assert now._asdict() == entry["block"]
        assert heuristics.norm_block.heuristic(sizes["columns"], sizes["rows"], INTERPRETER) != now
    x, w = torch.randn(40, 64), torch.randn(64)
    with ops.backend("triton"):  # and the op is right with it
        torch.testing.assert_close(
            ops.rms_norm(x, w, 1e-5), ops.reference.rms_norm(x, w, 1e-5), atol=1e-5, rtol=1e-5
        )


def test_what_is_wrong_is_never_timed(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of another number of rows than the heuristic's are made to fail their check; they would win."""
    judge = check.judge

    def strict(call: Callable[[Any], Any], against: Sequence[check.Truth]) -> check.Verdict:
        own = heuristics.norm_block(64, 40, INTERPRETER)
        if own.rows != heuristics.norm_block.heuristic(64, 40, INTERPRETER).rows:
            return check.Verdict(False, 1.0, 0.0, "planted")
        return judge(call, against)

    monkeypatch.setattr(check, "judge", strict)
    timed: list[Any] = []
    found: list[Any] = []
    tuning.tune(["MiniLM-L6"], ["norm"], tuner(lambda block: 1 / block.rows, timed), found.append)
    assert timed
    assert not found
    assert {block.rows for block in timed} == {heuristics.norm_block.heuristic(64, 40, INTERPRETER).rows}


def test_a_gain_within_the_noise_is_no_entry(table: Path) -> None:
    found: list[Any] = []
    tuning.tune(
        ["MiniLM-L6"], ["norm"], tuner(lambda block: 0.98 if block.rows == 2 else 1.0, []), found.append
    )
    assert not found


def test_tuning_ends_when_its_time_is_up(table: Path) -> None:
    lines: list[str] = []
    tuned_shapes = tuning.tune(
        ["MiniLM-L6"], ["norm"], tuner(lambda block: 1.0, [], say=lines.append), lambda e: None, seconds=0.0
    )
    assert tuned_shapes == 0
    assert lines == ["stopped after 0 s"]


def test_an_entry_replaces_the_one_of_the_same_shape(table: Path) -> None:
    entry = {
        "device": "a", "capability": [9, 0], "kernel": "norm", "shape": {"columns": 64, "rows": 64},
        "block": {"first": 64, "second": 0, "rows": 1, "num_warps": 1},
    }  # fmt: skip
    tuning.add_entry(table, entry)
    tuning.add_entry(table, entry | {"device": "b"})
    tuning.add_entry(table, entry | {"seconds": 1.0})
    assert [(e["device"], e.get("seconds")) for e in tuned.read_entries(table)] == [("b", None), ("a", 1.0)]


def test_the_backward_is_asked_too(table: Path) -> None:
    problems = [p for p in tuning.problems(["MiniLM-L6"], torch.float32) if p.case.op == "attention"]
    found = [
        asked
        for problem in problems
        for asked in tuning.questions(problem, torch.float32, "cpu", list(tuned.ALL))
    ]
    assert {"attention_dq", "attention_dkdv"} < {asked.kernel for asked in found}
    assert all(asked.device == INTERPRETER for asked in found)


@NO_GPU
@pytest.mark.parametrize("backward", [False, True])
def test_the_heuristics_own_answers_pass_the_check(table: Path, backward: bool) -> None:
    """Every op that is tuned, as it is judged before it is timed."""
    judged = 0
    for problem in tuning.problems(["SmolLM2-135M"], torch.float32):
        if problem.backward == backward:
            make = make_inputs(problem.case, torch.float32, "cpu")
            exact = with_written(problem.case, problem.reference)
            ours = with_written(problem.case, problem.ours)
            verdict = check.compare(ours, exact, exact, [make(torch.Generator().manual_seed(1))])
            assert verdict.ok, f"{problem.name}: {verdict.detail}"
            judged += 1
    assert judged > 2


@NO_GPU
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which a dry run changes; this puts it back
    message = cli_runs.run("tune", status=2).stderr
    assert "this PyTorch sees no CUDA device" in message
    assert "--dry-run" in message
    assert "unknown chip 'sm_10'" in cli_runs.run("tune", "--dry-run", "--chip", "sm_10", status=2).stderr
    unknown = cli_runs.run("tune", "--dry-run", "--model", "Eliza", status=2).stderr
    assert "unknown model 'Eliza'; expected MiniLM-L6" in unknown
    assert "Examples" in cli_runs.run("tune", "--help").stdout


@pytest.mark.slow
@NO_GPU
def test_a_dry_run_lists_candidates_that_fit_the_chip() -> None:
    """In a process of its own: in the interpreter, launches would run."""
    environment = {**os.environ, "MINILM_BENCH_TINY": "1", "MINILM_TUNED": ""}
    command = [sys.executable, "-m", "minilm", "tune", "--dry-run", "--model", "MiniLM-L6"]
    command += ["--kernel", "attention,norm", "--chip", "sm_86", "--most", "5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].endswith(f"candidates on {CHIPS['sm_86'].name}; nothing was measured")
    questions = [line for line in lines[:-1] if not line.startswith(" ")]
    assert questions
    assert {line.split(":")[0] for line in questions} <= {"attention", "norm"}
    assert len([line for line in lines if line.endswith("(the heuristic's)")]) == len(questions)
    assert len(lines) - 1 - len(questions) == int(lines[-1].split()[0]) > len(questions)


@pytest.mark.slow
@NO_GPU
def test_a_listing_without_values_asks_what_one_with_values_asks() -> None:
    """In a process of its own, as above; the tensors of the second are drawn and computed."""
    code = (
        "import contextlib, torch\n"
        "from minilm.benchmarks import tune\n"
        "from minilm.kernels import heuristics, tuned\n"
        "from minilm.kernels.devices import CHIPS\n"
        "asked = ['MiniLM-L6', 'SmolLM2-135M'], list(tuned.ALL), torch.bfloat16, CHIPS['sm_90']\n"
        "def found(): return list(tune.listing(*asked))\n"
        "hollow = found()\n"
        "tune.hollow, tune.asks = contextlib.nullcontext, lambda case: True\n"
        "drawn = found()\n"
        "assert [(a.kernel, a.shape, a.sizes, a.answer) for a in hollow] == "
        "[(a.kernel, a.shape, a.sizes, a.answer) for a in drawn]\n"
        "print(len(hollow))\n"
    )
    environment = {**os.environ, "MINILM_TUNED": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
