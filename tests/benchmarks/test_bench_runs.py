"""Runs of the bench in toy sizes: wrong kernels are detected, skipped peers have reasons, the page is
self-contained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from minilm import doctor
from minilm.benchmarks import (
    check,
    corpus,
    end_to_end,
    harness,
    models,
    ops,
    peers,
    report,
    shapes,
    standing,
    workers,
)
from minilm.benchmarks.limits import Limits
from minilm.benchmarks.peers.base import OpPeer, Skipped
from minilm.benchmarks.results import Results, rows, times
from minilm.ops.backends import native

TINY = harness.Settings(rounds=3, block_seconds=0.0002, budget_seconds=0.2, least_rounds=3, warmup_seconds=0)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILM_BENCH_TINY", "1")


def case_of(op: str, model: str | None = None) -> shapes.Case:
    """The first case of an op."""
    found = (c for c in shapes.op_cases() if c.op == op and model in (None, c.model))
    return next(found)


def by_name(cells: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {c["peer"]: c for c in cells}


def only(*names: str) -> Any:
    return lambda name: name in names


# Wrong and slow kernels
def test_a_planted_wrong_kernel_is_wrong_and_not_timed() -> None:
    case = case_of("add_layer_norm")

    def forgets_the_bias(values: Any) -> Any:
        x, residual, weight, _ = values
        total = x + residual
        return torch.nn.functional.layer_norm(
            total, total.shape[-1:], weight, None, case.spec.norm_eps
        ), total

    def forgets_the_residual(values: Any) -> Any:
        x, _, weight, bias = values
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, case.spec.norm_eps), x

    def right(values: Any) -> Any:
        return ops.reference_call(case)(values)

    planted = [
        OpPeer("bias", forgets_the_bias),
        OpPeer("residual", forgets_the_residual),
        OpPeer("right", right),
    ]
    cells = by_name(
        ops.run_case(
            case, "cpu", torch.float32, TINY, only("bias", "residual", "right", "minilm native"), planted
        )
    )
    for name in ("bias", "residual"):
        assert cells[name]["status"] == "wrong"
        assert "samples" not in cells[name]
        assert cells[name]["check"]["error"] > cells[name]["check"]["allowed"]
    assert cells["right"]["status"] == "ok"
    assert len(cells["right"]["samples"]) == 3
    wrong = next(line for line in report.lines([complete(c) for c in cells.values()]) if line.peer == "bias")
    assert "WRONG, not timed" in wrong.remark
    assert wrong.time == ""


@pytest.mark.parametrize("fault", ["nan", "shape", "unwritten", "half", "one element"])
def test_faults_that_a_check_must_see(fault: str) -> None:
    case = case_of("rms_norm")
    right = ops.reference_call(case)
    stale: list[torch.Tensor] = []

    def call(values: Any) -> Any:
        out = right(values).clone()
        if fault == "nan":
            out[-1, -1] = float("nan")
        elif fault == "shape":
            out = out[:-1]
        elif fault == "unwritten":  # right at the first call, and later what that call left in memory
            stale.append(out)
            return stale[0]
        elif fault == "half":
            return right(tuple(v.half() for v in values)).float()
        else:
            out[0, 0] += 1e-3
        return out

    make = ops.make_inputs(case, torch.float32, "cpu")
    draws = [make(torch.Generator().manual_seed(s)) for s in (1, 2)]
    assert not check.compare(call, right, right, draws).ok
    assert check.compare(right, right, right, draws).ok


def test_a_peer_that_breaks_is_shown_and_the_others_run_on() -> None:
    case = case_of("gated")

    def breaks(values: Any) -> Any:
        raise RuntimeError("no such instruction\nand more")

    wanted = only("broken", "minilm reference")
    cells = by_name(ops.run_case(case, "cpu", torch.float32, TINY, wanted, [OpPeer("broken", breaks)]))
    assert cells["broken"]["status"] == "failed"
    assert cells["broken"]["reason"] == "RuntimeError: no such instruction"
    assert times(complete(cells["minilm reference"])) is not None


def complete(cell: dict[str, Any]) -> dict[str, Any]:
    base = {
        "level": "op",
        "workload": "w",
        "precision": "fp32",
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
    }
    return {**base, "unit": "", "units_per_call": 1, "bytes": 1e6, "operations": 1e6, **cell}


def quantized_case(format: str) -> shapes.Case:
    """One row of activations: the hardest to judge."""
    found = (c for c in shapes.op_cases() if c.op == "quantized_linear")
    return next(c for c in found if c.call.dims["format"] == format)


def in_eight_bits(values: Any, steps: int = 127) -> Any:
    """What a native kernel makes of x: codes up to `steps`, by groups of 32 or (int8) by rows."""
    x, weight, bias = values
    groups = x.unflatten(1, (-1, x.shape[1] if weight.format == "int8" else 32))
    scale = groups.abs().amax(2, keepdim=True) / steps
    return (groups / scale).round().mul(scale).flatten(1), weight, bias


FAULTS: dict[str, Callable[[Any], Any]] = {
    "none": lambda v: v,
    "seven bits": lambda v: (in_eight_bits(v, 63)[0], *v[1:]),
    "a column is forgotten": lambda v: (v[0].index_fill(1, torch.tensor([5]), 0), *v[1:]),
    "scales of the next row": lambda v: (v[0], v[1]._replace(scale=v[1].scale.roll(1, 0)), v[2]),
    "codes of the next column": lambda v: (v[0], v[1]._replace(codes=v[1].codes.roll(1, 1)), v[2]),
    "no bias": lambda v: (v[0], v[1], torch.zeros(v[1].rows)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("format", ["int8", "q8_0", "q4_0", "q4_1"])
def test_rounded_activations_are_allowed_and_faults_are_not(format: str, fault: str) -> None:
    case = quantized_case(format)
    right = ops.reference_call(case)
    wrong = fault != "none"
    if fault == "no bias" and not case.call.dims["bias"]:
        pytest.skip("this layer has none")
    peer = OpPeer("x", lambda v: right(in_eight_bits(FAULTS[fault](v))), rounds=True)
    make = ops.make_inputs(case, torch.float32, "cpu")
    against = ops.truths(case, [make(torch.Generator().manual_seed(s)) for s in (1, 2)])
    verdict = ops.judge(peer, case, against)
    assert verdict.ok is not wrong, verdict.detail
    assert not ops.judge(replace(peer, rounds=False), case, against).ok  # and only to those that say so


def test_nan_of_a_kernel_that_rounds_is_wrong() -> None:
    case = quantized_case("q8_0")
    right = ops.reference_call(case)
    make = ops.make_inputs(case, torch.float32, "cpu")
    against = ops.truths(case, [make(torch.Generator().manual_seed(1))])
    peer = OpPeer("x", lambda v: right(v).index_fill(1, torch.tensor([7]), float("nan")), rounds=True)
    assert not ops.judge(peer, case, against).ok


def test_gradients_of_the_loss_are_judged() -> None:
    case = next(c for c in shapes.op_cases() if c.op == "linear_cross_entropy" and c.call.dims["backward"])
    right = ops.reference_call(case)

    def forgets_the_mean(values: Any) -> Any:
        loss, of_hidden, of_weight = right(values)
        return loss, of_hidden, of_weight * len(values[0])

    wanted = only("minilm torch", "minilm reference", "wrong")
    cells = by_name(
        ops.run_case(case, "cpu", torch.float32, TINY, wanted, [OpPeer("wrong", forgets_the_mean)])
    )
    assert {name: cell["status"] for name, cell in cells.items()} == {
        "minilm torch": "ok", "minilm reference": "ok", "wrong": "wrong"
    }  # fmt: skip


def test_native_linear_layers_are_measured_with_the_weight_packed() -> None:
    if native.unavailable is not None:
        pytest.skip(native.unavailable)
    for op in ("linear", "quantized_linear"):
        cells = ops.run_case(case_of(op), "cpu", torch.float32, TINY, only("minilm native"))
        assert times(complete(cells[0])) is not None, cells


# Every op
@pytest.mark.parametrize(
    "op",
    [
        pytest.param(op, marks=pytest.mark.slow) if "rope" in op or op == "append_kv" else op
        for op in sorted({c.op for c in shapes.op_cases()})
    ],
)
def test_every_op_has_cases_and_right_implementations(op: str) -> None:
    case = case_of(op)
    cells = ops.run_case(case, "cpu", torch.float32, TINY, lambda name: name.startswith("minilm"))
    assert {c["status"] for c in cells} <= {"ok", "skipped"}
    assert any(c["status"] == "ok" for c in cells)
    assert all(c["reason"] for c in cells if c["status"] == "skipped")


def test_the_cases_cover_the_op_interface() -> None:
    from minilm.ops import dispatch

    elsewhere = {"blocks", "decode_step", "embed", "pool"}  # the layer and end-to-end levels measure them
    assert {c.op for c in shapes.op_cases()} == set(dispatch.ops()) - elsewhere
    names = [c.name for c in shapes.op_cases()]
    assert len(names) == len(set(names))


def test_sdpa_is_measured_by_backend_and_is_right() -> None:
    case = case_of("attention", "GPT-2")
    wanted = only("SDPA math", "SDPA flash", "minilm reference")
    cells = by_name(ops.run_case(case, "cpu", torch.float32, TINY, wanted))
    assert cells["SDPA math"]["status"] == "ok"
    assert cells["SDPA flash"]["status"] == "ok"


# Peers
def test_peers_that_cannot_run_say_why() -> None:
    case = case_of("attention")
    skipped = {p.name: p.reason for p in peers.op_peers(case, "cpu", torch.float32) if isinstance(p, Skipped)}
    assert skipped["FlashAttention-2"] == "runs on a GPU only"
    assert "Liger" in {p.name for p in peers.op_peers(case_of("layer_norm"), "cpu", torch.float32)}


def test_an_engine_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in peers.ENGINES:
        kind = peers.engine_class(name)
        if kind.package is not None:
            monkeypatch.setattr(kind, "package", "no-such-package-of-minilm")
            assert "is not installed (make bench-peers)" in str(kind.unavailable("cpu"))
            monkeypatch.undo()
    assert peers.engine_class("llama.cpp f32").unavailable("cuda") is not None
    with pytest.raises(ValueError, match="unknown engine 'x'"):
        peers.engine_class("x")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "limit"), [(1 << 40, 1 << 10), (1 << 10, None), (None, 1 << 10)])
def test_engines_that_do_not_fit_into_memory_are_left_out(
    size: int | None, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILM_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "memory", lambda: {"available_bytes": size, "limit_bytes": limit})
    options = end_to_end.Options(TINY, 1, "cpu", only("minilm", "transformers sdpa"))
    workloads = end_to_end.encoder_workloads("MiniLM-L6", models.assets("MiniLM-L6"), with_corpus=False)[:1]
    found = list(end_to_end.run_model("MiniLM-L6", workloads, Limits("cpu", "made up"), options, cold=False))
    assert {c["peer"]: c["status"] for c in found} == dict.fromkeys(
        ("minilm", "transformers sdpa"), "skipped"
    )
    assert all(re.search(r"needs about \d+\.\d GB of memory .* are free", c["reason"]) for c in found)


def test_engines_are_pinned() -> None:
    folder = Path(peers.__file__).resolve().parent.parent
    pins = (folder / "constraints-peers.txt").read_text() + (folder.parent / "constraints.txt").read_text()
    for name in peers.ENGINES:
        package = peers.engine_class(name).package
        assert package is None or re.search(rf"^{package}==[\d.]+", pins, re.MULTILINE), package


def test_peers_import_nothing_before_they_are_used() -> None:
    code = "import sys; from minilm.benchmarks import peers; [peers.engine_class(n) for n in peers.ENGINES]; "
    code += (
        "heavy = {'torch', 'transformers', 'numpy', 'onnxruntime', 'openvino', 'ctranslate2', 'llama_cpp'}; "
    )
    code += "print(sorted(heavy & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("model", ["MiniLM-L6", "GPT-2"])
def test_an_engine_in_its_own_process_gives_our_answer(model: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MINILM_BENCH_CACHE", str(tmp_path))
    assets = models.assets(model)
    with workers.Worker("minilm", threads=1) as worker:
        worker.load(assets)
        if model == "MiniLM-L6":
            batch = [[2, 9, 17, 3], [2, 5, 3]]
            found = torch.tensor(worker.ask("embed", ids=batch))
            alone = torch.tensor(worker.ask("embed", ids=batch[1:]))
            assert torch.allclose(found.norm(dim=1), torch.ones(2), atol=1e-5)
            assert torch.allclose(found[1:], alone, atol=1e-5)
            request = {"kind": "ids", "batches": [batch]}
        else:
            tokens = worker.ask("tokens", prompts=[[5, 6, 7], [8, 9, 10]], new=4)
            assert [len(row) for row in tokens] == [4, 4]
            request = {"kind": "decode", "prompts": [[5, 6, 7]], "new": 3}
        assert worker.ask("block", workload=request, calls=2) > 0
        worker.pause()
        assert worker.ask("peak") > 10 << 20  # goes on after a pause
        with pytest.raises(workers.WorkerError, match="unknown request 'x'") as error:
            worker.ask("x")
        assert error.value.kind == "failed"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_stopped_worker_ends_with_the_bench() -> None:
    code = """
import contextlib, time
from minilm.benchmarks.workers import Worker, WorkerError
worker = Worker("minilm", threads=1)
with contextlib.suppress(WorkerError):  # its answer to what it cannot do yet: it has begun
    worker.ask("peak")
worker.pause()
print(worker._process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as bench:
        try:
            assert bench.stdout is not None
            worker = Path("/proc") / bench.stdout.readline().strip()
            for _ in range(6000):  # a signal takes effect when its process is next given a core
                if " (stopped)" in (worker / "status").read_text():
                    break
                time.sleep(0.1)
            else:
                raise AssertionError("the worker was not stopped")
        finally:
            bench.kill()
    for _ in range(6000):  # ten minutes: a busy machine may take its time
        state = (worker / "status").read_text() if worker.exists() else "(zombie)"
        if "(zombie)" in state:
            return
        time.sleep(0.1)
    raise AssertionError(f"the worker lives on: {state}")


def test_a_worker_that_dies_says_what_it_said() -> None:
    with workers.Worker("no such engine", threads=1) as worker, pytest.raises(workers.WorkerError) as error:
        worker.ask("peak")
    assert "unknown engine" in str(error.value) or "AssertionError" in str(error.value)


# Workloads
@pytest.mark.slow
def test_the_corpus_is_the_same_every_time() -> None:
    first = corpus.sentences(24)
    code = "from minilm.benchmarks import corpus; print(corpus.fingerprint(corpus.sentences(24)))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert answer.stdout.strip() == corpus.fingerprint(first)
    assert len(set(first)) == 24


def test_the_corpus_has_its_mix_of_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINILM_BENCH_TINY")
    words = [len(text.split()) for text in corpus.sentences(2000)]
    for part, low, high in corpus.MIX:
        assert sum(low <= n <= high for n in words) == round(2000 * part)
    assert len(words) == 2000
    half = words[:1000]
    assert abs(sum(half) / sum(words) - 0.5) < 0.05  # no order by length


# Output
def test_the_page_stands_alone_and_shows_what_lost(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from minilm.benchmarks import page

    results = made_up()
    results.write(tmp_path / "run.json")
    (tmp_path / "other.json").write_text("{}")
    text = page.write(tmp_path).read_text()
    loads = re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert loads
    assert all(found.startswith(("data:", "#")) for found in loads)
    assert "<script" not in text
    assert text.count("data:image/png;base64,") >= 2
    for words in (
        "WRONG, not timed",
        "2.02x faster (1.41 to 3.78)",
        "skipped: is not installed",
        "&lt;b&gt;",
        "not a result",
    ):
        assert words in text, words
    with pytest.raises(Exception, match="holds no result"):
        page.build(tmp_path / "nowhere")


def made_up() -> Results:
    machine = {"cpu": "<b>", "usable_cores": 2, "native_isa": None, "native_unavailable": "not built"}
    machine |= {"versions": {}, "features": [], "architecture": "x86_64", "commit": "abc"}
    table = Limits("cpu", "made up")
    for name, value in (("read", 2e10), ("copy", 1.5e10), ("fma", 1e11), ("gemm float32", 9e10)):
        for factor in (0.99, 1.0, 1.01):
            table.add(name, 1, value * factor)
    good = [1e-3, 1.01e-3, 0.99e-3]
    shared = {"floor_seconds": 5e-4, "binding": "read bandwidth"}
    cells = [
        complete({"peer": "minilm native", "ours": True, "status": "ok", "samples": good, **shared}),
        complete({"peer": "other", "ours": False, "status": "ok", "samples": [1e-3, 5e-3, 2e-3], **shared}),
        complete({"peer": "bad", "ours": False, "status": "wrong", "reason": "error 1"}),
        complete({"peer": "absent", "ours": False, "status": "skipped", "reason": "is not installed"}),
    ]
    whole = {"level": "end to end", "model": "M", "unit": "sentences", "units_per_call": 4}
    cells += [{**cell, **whole, "workload": "M 1 x 16"} for cell in cells]
    cells += [{**c, **whole, "workload": f"M sweep 1 x {n}"} for c in cells[:2] for n in (8, 16, 32)]
    return Results(machine, {"rounds": 3}, [table], cells)


def test_tables_show_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    report.print_tables(made_up(), Console(width=220))
    shown = capsys.readouterr().out
    for words in ("minilm native", "bound by read bandwidth", "50%", "(1.41 to 3.78)", "WRONG", "skipped"):
        assert words in shown, words


def whole_models() -> Results:
    """Two models, engines in 32 and 8 bits: seconds a call, noise of 1 %."""
    cells = []
    for model, unit in (("MiniLM-L6", "sentences"), ("SmolLM2-135M", "tokens")):
        for name, kind in (("1 x 16", unit), ("cold start", "s")):
            for peer, precision, seconds in (
                ("minilm", "fp32", 1.0),
                ("minilm reference", "fp32", 2.0),
                ("minilm int8", "int8", 0.4),
                ("minilm q8_0", "int8", 0.5),
                ("slow", "fp32", 1.5),
                ("quick", "fp32", 0.8),
                ("alike", "fp32", 1.0),
                ("half f16", "fp16", 0.5),
                ("other int8", "int8", 0.45),
                ("other q8_0", "int8", 0.45),
            ):
                noise = (0.99, 1.01, 1.0) if peer == "alike" else (1.0, 1.0, 1.0)
                cell = {
                    "peer": peer,
                    "ours": peer.startswith("minilm"),
                    "precision": precision,
                    "model": model,
                }
                cell |= {"status": "ok", "samples": [seconds * n for n in noise], "units_per_call": 1}
                cell |= {"level": "end to end", "workload": f"{model} {name}", "unit": kind, "threads": 2}
                cells.append(complete({"peak_bytes": 2 << 20, **cell}))
        wrong = {"peer": "bad q4_1", "ours": False, "status": "wrong", "precision": "q4", "reason": "x"}
        absent = {"peer": "absent", "ours": False, "status": "skipped", "precision": "fp32", "reason": "y"}
        rest = {"level": "end to end", "workload": f"{model} 1 x 16", "unit": unit, "threads": 2}
        cells += [complete({**c, **rest, "model": model}) for c in (wrong, absent)]
    return Results(made_up().machine, {}, [], cells)


def test_like_is_compared_with_like() -> None:
    cells = next(iter(rows(whole_models().cells).values()))
    named = by_name(cells)
    for peer, ours in (
        ("slow", "minilm"),
        ("other int8", "minilm int8"),
        ("other q8_0", "minilm q8_0"),  # not the faster int8
        ("half f16", "minilm"),  # there is none in 16 bits
        ("minilm reference", "minilm"),
        ("minilm q8_0", "minilm q8_0"),
    ):
        assert standing.counterpart(named[peer], cells) is named[ours], peer
    outcomes = {c.cell["peer"]: c.outcome for c in standing.comparisons(whole_models())}
    assert outcomes == {
        "slow": "won", "quick": "lost", "alike": "even", "half f16": "lost", "other int8": "won",
        "other q8_0": "lost",
    }  # fmt: skip
    assert list(standing.grouped(cells)) == [
        "32-bit weights", "16-bit weights", "8-bit weights", "4-bit weights"
    ]  # fmt: skip


def test_an_op_of_ours_that_eager_beats_is_lost() -> None:
    times_of = {"minilm native": 2.0, "minilm reference": 1.0, "torch.compile": 3.0}
    cells = [
        complete({"peer": peer, "ours": peer.startswith("minilm"), "status": "ok", "samples": [s] * 3})
        for peer, s in times_of.items()
    ]
    found = standing.comparisons(Results({}, {}, [], cells), ("op",))
    assert {c.cell["peer"]: c.outcome for c in found} == {"minilm reference": "lost", "torch.compile": "won"}


def test_the_page_shows_losses_first_and_groups_bars(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from minilm.benchmarks import page

    whole_models().write(tmp_path / "run.json")
    text = page.build(tmp_path)
    assert "24 comparisons of whole models, like with like: 8 won, 12 lost, 4 even." in text
    losses = text[text.index("What was lost") : text.index('class="cards"')]
    found = re.findall(r"<td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td>", losses)
    assert found[0] == ("MiniLM-L6 1 x 16 · 2 threads", "half f16", "minilm", "2.00x slower")
    assert len(found) == 12
    card = text[text.index('class="card"') :]
    order = [card.index(f"<span>{words}") for words in ("32-bit weights", "16-bit weights", "8-bit weights")]
    assert order == sorted(order)
    assert "16-bit weights, beside minilm&#x27;s 32" in card
    assert re.search(r'<div class="row lost"><span>quick</span>.*?1.25x slower', card)
    assert '<div class="none wrong">bad q4_1 WRONG, not timed: x</div>' in card
    assert "1 sentence of 16 tokens at once" in card


def test_markdown_tables_fit_a_readme(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    whole_models().write(path)
    done = invoke("--markdown", str(path))
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line for line in lines if line.startswith("| ") and "threads" in line] == [
        "| 2 threads | 32-bit weights | 8-bit weights |",
        "| MiniLM-L6, 2 threads, sentences/s | 1 x 16 |",
        "| SmolLM2-135M, 2 threads, tokens/s | 1 x 16 |",
        "| cold start, 2 threads, s (most memory) | MiniLM-L6 | SmolLM2-135M |",
    ]
    for line in (
        "| **minilm** | 1 |",
        "| quick | **1.25x slower** |",
        "| alike | even |",
        "| *16-bit weights, beside minilm's 32* | |",
        "| other q8_0 | **1.11x slower** |",
        "| bad q4_1 | **WRONG** |",
        "| **minilm int8** | 0.40 (2 MiB) | 0.40 (2 MiB) |",
        "| quick | **1.25x slower** (2 MiB) | **1.25x slower** (2 MiB) |",
    ):
        assert line in lines, line
    assert "absent" not in done.output  # nothing to tell of it
    one = invoke("--markdown", str(path), "--model", "SmolLM2-135M", "--threads", "2")
    assert "MiniLM" not in one.output
    assert "tokens/s" in one.output
    for arguments in (("--model", "GPT-2"), ("--threads", "7")):
        assert invoke("--markdown", str(path), *arguments).exit_code == 2


# The command
def invoke(*arguments: str) -> Any:
    from minilm.cli.app import app

    return CliRunner().invoke(app, ["bench", *arguments])


def test_bench_writes_results_and_compares_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILM_BENCH_CACHE", str(tmp_path / "cache"))
    arguments = ["--level", "op", "--model", "MiniLM-L6", "--only", "^add_layer_norm", "--threads", "1"]
    done = invoke(*arguments, "--peers", "minilm", "--output", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "out").rglob("*.json")
    results = Results.read(path)
    assert {c["op"] for c in results.cells} == {"add_layer_norm"}
    assert results.limits[0].get("read", 1) > 0
    timed = [c for c in results.cells if times(c)]
    assert timed
    assert all(len(c["samples"]) >= 3 and c["floor_seconds"] > 0 for c in timed)
    for c in results.cells:
        if times(c) and c["ours"]:
            c["samples"] = [s * 100 for s in c["samples"]]
    slow = path.with_name("slow.json")
    results.write(slow)
    same, worse = invoke("--compare", str(path), str(path)), invoke("--compare", str(path), str(slow))
    assert same.exit_code == 0
    assert "0 differ" in same.output
    assert worse.exit_code == 1
    assert "slower" in worse.output


def test_explain_accounts_for_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILM_BENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    done = invoke("--explain", "MiniLM-L6", "--threads", "1")
    assert done.exit_code == 0, done.output
    for words in ("add_layer_norm", "linear", "attention", "rest", "limit allows", "ran on"):
        assert words in done.output, words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "x"], "unknown level 'x'"),
        (["--model", "x"], "unknown model 'x'"),
        (["--threads", "none"], "--threads must be numbers"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--compare", "/none/a.json", "/none/b.json"], "No such file"),
    ],
)
def test_wrong_options_are_one_clear_line(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.output + (done.stderr if done.stderr_bytes else "")
