"""minilm.doctor: the report agrees with what the process has, and survives what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import minilm
from minilm import doctor
from minilm.ops import dispatch
from minilm.ops.backends import native


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(doctor.examine()))  # as JSON can hold it
    return found


def test_the_report_tells_what_this_process_has(report: dict[str, Any]) -> None:
    assert report["minilm"]["version"] == minilm.__version__
    assert report["python"]["version"] == platform.python_version()
    assert report["torch"]["version"] == torch.__version__
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert report["cpu"]["cores"] == os.cpu_count()
    assert 1 <= report["cpu"]["usable_cores"] <= report["cpu"]["cores"]
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert (report["gpu_reason"] is None) == torch.cuda.is_available()
    assert report["packages"]["safetensors"]["version"]
    assert not report["problems"]


def test_the_extension_is_reported_as_it_is(report: dict[str, Any]) -> None:
    extension = report["extension"]
    assert extension["built"] == (native.unavailable is None)
    assert extension["isa"] == native.cpu_isa()
    assert extension["isas"] == native.cpu_isas()
    assert extension["reason"] == native.unavailable
    machine = platform.machine()
    if machine in doctor.ISAS and extension["built"]:
        assert (*extension["isas"], *extension["not_run"]) == doctor.ISAS[machine]


def test_instruction_sets_that_no_test_has_run_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(native, "unavailable", None)
    monkeypatch.setattr(native, "cpu_isas", lambda: ["generic", "avx2"])
    notes = doctor.examine()["notes"]
    sets = "avx512, avx512_vnni, avx512_bf16"
    assert (
        f"this processor cannot run the kernels for {sets}, so tests on this machine do not cover them"
        in notes
    )
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(native, "cpu_isas", lambda: ["generic", "neon_dotprod"])
    notes = doctor.examine()["notes"]
    assert "the native kernels for this architecture were tested in an emulator only" in notes
    assert not any("tests on this machine" in note for note in notes)


def setup_module() -> Any:
    spec = importlib.util.spec_from_file_location("minilm_setup", Path(__file__).parent.parent / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


def test_the_instruction_sets_are_those_that_are_compiled() -> None:
    setup = setup_module()
    for machine, isas in doctor.ISAS.items():
        assert tuple(setup.instruction_sets(machine)) == isas


@pytest.mark.skipif(native.unavailable is not None, reason="the extension is not built")
def test_a_build_for_this_machine_alone_has_its_best_instruction_set() -> None:
    setup = setup_module()
    sets = setup.native_sets(setup.instruction_sets(platform.machine()))
    assert set(sets) >= {"generic", native.cpu_isas()[-1]}
    assert len(sets) <= 2 or not Path("/proc/cpuinfo").exists()


def test_every_op_has_a_row_for_every_device_and_dtype(report: dict[str, Any]) -> None:
    rows = {(row["op"], row["device"], row["dtype"]) for row in report["ops"]}
    assert len(rows) == len(report["ops"])
    for op in dispatch.ops():
        for dtype in ("float32", "bfloat16"):
            assert (op, "cpu", dtype) in rows
    for row in report["ops"]:
        assert set(row) == {"op", "device", "dtype", "backend", "refused", "error"}
        assert row["backend"] in dispatch.implementations(row["op"])
        assert row["backend"] not in row["refused"]
        better = dispatch.PREFERENCE[row["device"]]
        better = better[: better.index(row["backend"])]
        assert all(row["refused"].get(name) for name in better), row


def test_what_is_said_to_run_does_run() -> None:
    """The typical call is described like a real one: the decision is the one that a call of the op makes."""
    x, weight = torch.randn(5, 768), torch.randn(768)
    minilm.explain(reset=True)
    minilm.ops.add_layer_norm(x, x, weight, weight, 1e-5)
    minilm.ops.rms_norm(x, weight, 1e-5)
    ran = {decision.op: decision.chosen.backend for decision in minilm.explain().decisions}
    for op in ("add_layer_norm", "rms_norm"):
        assert dispatch.decide(op, doctor.typical_call(op, "cpu", torch.float32)).chosen.backend == ran[op]


def test_nothing_is_counted_as_run() -> None:
    minilm.explain(reset=True)
    doctor.examine()
    assert not minilm.explain().decisions


def test_an_op_that_the_table_does_not_know_is_an_error() -> None:
    with pytest.raises(ValueError, match="'convolution'"):
        doctor.typical_call("convolution", "cpu", torch.float32)


def _examine(code: str = "", **environment: str) -> dict[str, Any]:
    """The report of a process of its own, after `code`."""
    program = f"{code}\nimport json\nfrom minilm.doctor import examine\nprint(json.dumps(examine()))"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def test_an_explicit_backend_shows_in_every_row() -> None:
    report = _examine(MINILM_BACKEND="reference")
    assert {row["backend"] for row in report["ops"]} == {"reference"}
    assert report["environment"]["MINILM_BACKEND"] == "reference"
    reasons = {row["refused"].get("torch") for row in report["ops"] if row["op"] == "attention"}
    assert reasons == {"not requested (chosen: reference)"}


def test_a_backend_that_cannot_run_is_a_problem() -> None:
    report = _examine(MINILM_BACKEND="torch")
    rows = {row["op"]: row for row in report["ops"] if row["dtype"] == "float32"}
    assert rows["attention"]["backend"] == "torch"
    assert rows["rope"]["backend"] is None
    assert "there is no torch implementation of rope" in rows["rope"]["error"]
    assert report["problems"]


def test_an_impossible_instruction_set_is_a_problem() -> None:
    if native.unavailable is not None:
        pytest.skip(native.unavailable)
    report = _examine(MINILM_CPU_ISA="avx1024")
    assert any("avx1024" in problem for problem in report["problems"])
    assert report["ops"] == []


def test_without_torch_the_rest_is_told() -> None:
    report = _examine("import sys; sys.modules['torch'] = None")
    assert report["torch"] is None
    assert report["ops"] == []
    assert report["packages"]["numpy"]["version"]
    assert any("PyTorch does not load" in problem for problem in report["problems"])


def test_without_the_extension_the_reason_is_told() -> None:
    report = _examine("import sys; sys.modules['minilm._C'] = None")
    assert report["extension"]["built"] is False
    assert report["extension"]["reason"]
    norm = next(row for row in report["ops"] if row["op"] == "layer_norm")
    assert norm["backend"] == "reference"
    assert norm["refused"]["native"] == report["extension"]["reason"]


def test_missing_models_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Path:
        raise minilm.HubError(f"{name} is not installed: pip install it")

    monkeypatch.setattr(doctor, "resolve", nothing)
    report = doctor.examine()
    assert all(model["path"] is None and model["reason"] for model in report["models"].values())
    assert sum("pip install it" in note for note in report["notes"]) == 2
    assert not report["problems"]


def test_a_missing_requirement_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package-of-ours", "")
    assert any("pip install no-such-package-of-ours" in p for p in doctor.examine()["problems"])
