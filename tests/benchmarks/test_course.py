"""The progress of a run: remaining time and time limit, with a simulated clock."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from minilm.benchmarks import end_to_end, machine, shapes
from minilm.benchmarks.course import Course, State, Step
from minilm.benchmarks.run import Plan, _op_cases


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def course(limit: float = math.inf, **options: Any) -> tuple[Course, Clock]:
    clock = Clock()
    return Course(limit, clock=clock, **options), clock


def test_the_time_left_follows_the_pace_of_the_machine() -> None:
    run, clock = course()
    assert run.state() == State("", 0, 0, 0.0, 0.0)
    run.plan([Step("op", "a", 1.0), Step("op", "b", 2.0), Step("engine", "c", 10.0)])
    assert run.state().left == 13.0
    assert run.begin("op", "a", 1.0)
    clock.now += 0.5
    assert run.state() == State("a", 0, 3, 0.5, 12.5)
    clock.now += 2.5
    run.end()  # three times its guess
    assert run.state() == State("", 1, 3, 3.0, 3 * 2.0 + 3 * 10.0)  # of engines nothing is known yet
    run.begin("engine", "c", 10.0)
    clock.now += 10.0
    run.end()
    assert run.state().left == 3 * 2.0
    run.begin("op", "b", 2.0)
    clock.now += 100.0
    assert run.state().left == 0.0  # and never less
    run.end()
    assert run.state() == State("", 3, 3, 113.0, 0.0)


def test_what_would_not_end_in_time_is_left_out_and_named() -> None:
    run, clock = course(20.0)
    run.plan([Step("op", name, 4.0) for name in "abc"])
    assert run.begin("op", "a", 4.0)
    clock.now += 12.0
    run.end()
    assert run.state().left == 8.0  # not the 24 that the steps would take
    assert not run.begin("op", "b", 4.0)
    assert run.begin("op", "c", 4.0, needed=True)
    run.end()
    assert run.left_out == ["b"]
    assert (run.state().done, run.state().steps) == (3, 3)


def test_shares_of_the_time() -> None:
    run, clock = course(100.0, reserve=20.0)
    assert run.remaining() == 100.0
    end = run.within(0.25)
    assert (end, run.remaining()) == (120.0, 20.0)
    run.within(0.5, end)
    assert run.remaining() == 10.0
    clock.now += 30.0
    run.within(0.5, end)
    assert run.remaining() == 0.0
    run.within(1.0)
    assert run.remaining() == 50.0


def test_steps_that_are_not_needed_are_not_waited_for() -> None:
    run, _ = course()
    run.plan([Step("engine", name, 5.0) for name in ("M: a", "M: b", "N: a")])
    run.drop_all("M: ")
    assert (run.state().steps, run.state().left) == (1, 5.0)
    run.leave_out("N", "N: a")
    assert (run.left_out, run.state().left) == (["N"], 0.0)


def test_where_the_time_is_limited_one_shape_of_each_op_comes_first() -> None:
    plan = Plan(models=["MiniLM-L6", "SmolLM2-135M"])
    everything = _op_cases(plan)
    plan.course = Course(120.0)
    ordered = _op_cases(plan)
    assert sorted(case.name for case in ordered) == sorted(case.name for case in everything)
    ops = [case.op for case in ordered]
    assert len(set(ops[: len(set(ops))])) == len(set(ops))


@pytest.mark.slow
def test_every_step_that_was_announced_is_one_that_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names agree, so that the count ends at its total."""
    monkeypatch.setenv("MINILM_BENCH_TINY", "1")
    from minilm.benchmarks.run import run

    seen: list[State] = []
    plan = Plan(levels=["op"], models=["MiniLM-L6"], only="^(layer_norm|gated)", peers="minilm", threads=[1])
    plan.course = Course(show=seen.append)
    results = run(plan)
    assert results.cells
    final = plan.course.state()
    assert final.done == final.steps > 2
    assert final.left == 0.0
    assert [state.done for state in seen] == list(range(len(seen)))
    assert results.settings["left_out"] == []


def test_no_time_at_all_leaves_everything_out_but_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILM_BENCH_TINY", "1")
    from minilm.benchmarks.run import run

    plan = Plan(levels=["op", "layer", "e2e"], models=["MiniLM-L6"], only="", threads=[1])
    plan.course = Course(0.0)
    results = run(plan)
    assert results.cells == []
    assert results.limits[0].get("read", 1) > 0
    names = results.settings["left_out"]
    assert {case.name for case in shapes.op_cases(["MiniLM-L6"])} < set(names)
    assert names[0] == "MiniLM-L6: everything"
    assert names[-1] == "layer of MiniLM-L6"


def test_engines_that_most_people_use_are_started_first_where_time_is_limited() -> None:
    found = [
        (name, None)
        for name in ("minilm reference", "minilm q8_0", "transformers eager", "onnxruntime", "minilm")
    ]
    assert [name for name, _ in sorted(found, key=end_to_end._order(limited=True))] == [
        "minilm", "onnxruntime", "minilm q8_0", "transformers eager", "minilm reference"
    ]  # fmt: skip
    assert [name for name, _ in sorted(found, key=end_to_end._order(limited=False))] == [
        "minilm q8_0", "onnxruntime", "minilm", "transformers eager", "minilm reference"
    ]  # fmt: skip


BUSY = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\ninput()\n"


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="only Linux tells")
def test_own_processes_are_not_taken_for_others() -> None:
    """A child's time is in the tree of this process while it runs and after it has ended."""
    before = sum(machine._tree().values())
    with subprocess.Popen(
        [sys.executable, "-c", BUSY + "print()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        while machine._tree().get(child.pid, 0.0) < 0.3:
            pass
        during = sum(machine._tree().values()) - before
        child.communicate(b"\n")
    after = sum(machine._tree().values()) - before
    assert during >= 0.29
    assert after >= during - 0.05
    told = machine.Load().stop()
    assert told["others_share"] is None or 0.0 <= told["others_share"] <= 1.0


def test_hollow_tensors_have_shapes_and_no_values() -> None:
    from minilm.benchmarks.hollow import LARGE, hollow

    rows = LARGE // 64
    with hollow():
        generator = torch.Generator().manual_seed(0)
        large = torch.randn((rows, 64), generator=generator).to(torch.bfloat16)
        product = large @ large.T
        whole = torch.isfinite(large.float()).all()
        small = torch.arange(5) * 2
        view = large.view(-1, 32)[3:]
        large.mul_(2)
    assert (product.shape, product.dtype, product.device.type) == ((rows, rows), torch.bfloat16, "cpu")
    assert bool(whole)
    assert small.tolist() == [0, 2, 4, 6, 8]
    assert view.shape == (2 * rows - 3, 32)
    assert view.untyped_storage().data_ptr() == large.untyped_storage().data_ptr()
