"""The bench's method: statistics, harness, costs, limits, comparison. Clocks are simulated, so the tests do
not depend on the machine's speed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.benchmarks import compare, costs, harness, limits, shapes, stats
from minilm.benchmarks.results import ResultError, Results, share, times
from minilm.ops import quantized


# Statistics
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40), st.sampled_from([0.2, 0.5, 0.8]))
@settings(deadline=None, max_examples=60)
def test_percentile_is_numpys(values: list[float], share_below: float) -> None:
    numpy = pytest.importorskip("numpy")
    assert stats.percentile(values, share_below) == pytest.approx(numpy.quantile(values, share_below))


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no repeats"):
        stats.percentile([], 0.5)


def test_a_slow_moment_of_the_machine_does_not_spoil_a_ratio() -> None:
    """Both engines of a round are slowed alike: the ratio stays, though each time alone spreads widely."""
    machine = [1.0, 1.0, 3.0, 3.0, 1.5, 1.0, 4.0]
    ours, other = [0.01 * m for m in machine], [0.02 * m for m in machine]
    assert stats.too_wide(stats.summary(ours)) is not None
    found = stats.ratio(ours, other)
    assert found.reason is None
    assert found.value.median == pytest.approx(2.0)
    assert str(found) == "2.00x faster"


def test_a_wide_spread_is_said_beside_a_ratio() -> None:
    found = stats.ratio([1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 5.0, 2.0, 9.0, 3.0])
    assert str(found) == "3.00x faster (1.80 to 5.80)"
    assert found.reason is not None
    assert found.reason.startswith("spread too wide")
    assert "few" in str(stats.ratio([1.0, 1.0], [2.0, 2.0]))


def test_ratio_of_different_numbers_of_repeats_takes_the_corners() -> None:
    found = stats.ratio([1.0, 1.0, 1.0, 1.1], [2.0, 2.0, 2.0], max_spread=0.5)
    assert found.value.median == pytest.approx(2.0)
    assert found.value.p20 < found.value.p80


def test_moved_needs_ranges_apart_and_a_difference_worth_telling() -> None:
    quiet = [1.00, 1.01, 0.99, 1.00, 1.02]
    assert stats.moved(quiet, [v * 1.5 for v in quiet]) == pytest.approx(1.5)
    assert stats.moved(quiet, [v * 1.03 for v in quiet]) is None  # apart, and too small
    assert stats.moved([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 6.0]) is None  # within the noise


# Harness
class Clock:
    """Time that only moves when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def worker(clock: Clock, seconds: float, order: list[str] | None = None, name: str = "") -> Any:
    """A call that takes `seconds`, and notes its name."""

    def call(values: Any) -> None:
        clock.now += seconds
        if order is not None:
            order.append(name)

    return call


def test_measure_finds_the_time_of_a_call() -> None:
    clock = Clock()
    blocks = {
        n: harness.block_of(worker(clock, s), [0, 1], clock=clock) for n, s in (("a", 0.001), ("b", 0.003))
    }
    found = harness.measure(blocks, harness.Settings(rounds=6, block_seconds=0.02), clock)
    assert found["a"].seconds == pytest.approx([0.001] * 6)
    assert found["b"].seconds == pytest.approx([0.003] * 6)
    assert found["a"].calls >= 20
    assert found["b"].calls >= 7


def test_engines_run_in_turn_and_the_order_moves_on() -> None:
    clock, turns = Clock(), list[str]()
    blocks = {n: harness.block_of(worker(clock, 1.0), [0], clock=clock) for n in "abc"}
    harness.measure(
        blocks, harness.Settings(rounds=4, block_seconds=0.5, budget_seconds=99), clock, turns.append
    )
    assert "".join(turns) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_the_budget_ends_a_run_but_not_before_the_least_rounds() -> None:
    clock = Clock()
    blocks = {"slow": harness.block_of(worker(clock, 10.0), [0], clock=clock)}
    plan = harness.Settings(rounds=50, budget_seconds=20.0, least_rounds=4, warmup_seconds=0)
    assert len(harness.measure(blocks, plan, clock)["slow"].seconds) == 4
    hasty = replace(plan, budget_seconds=1.0)  # one call takes ten times the budget
    assert len(harness.measure(blocks, hasty, clock)["slow"].seconds) == harness.FEWEST


def test_inputs_rotate_over_more_than_twice_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINILM_BENCH_TINY", raising=False)
    sets = harness.rotated(lambda g: (torch.randn(100, generator=g),), cache=4000)
    assert harness.nbytes(sets) > 2 * 4000
    assert len({float(s[0][0]) for s in sets}) == len(sets)  # fresh data in each
    seen: list[int] = []
    block = harness.block_of(seen.append, [0, 1, 2])
    block(2), block(2)
    assert seen == [0, 1, 2, 0]


def test_a_planted_slow_engine_is_caught(tmp_path: Path) -> None:
    """The second run's engine takes 1.4 times as long: --compare says so, and of the other that it is
    alike."""

    def run(seconds: float) -> Results:
        clock = Clock()
        blocks = {
            "minilm native": harness.block_of(worker(clock, seconds), [0], clock=clock),
            "other": harness.block_of(worker(clock, 0.002), [0], clock=clock),
        }
        taken = harness.measure(blocks, harness.Settings(rounds=7), clock)
        cells = [cell(name, samples.seconds) for name, samples in taken.items()]
        return Results(MACHINE, {}, [], cells)

    found = compare.compare(run(0.001), run(0.0014))
    assert [(c.kind, c.peer) for c in found.changes] == [("slower", "minilm native")]
    assert found.changes[0].after == pytest.approx(0.0014)
    assert found.worse == found.changes
    assert found.alike == 1


# Comparison and files
MACHINE = {"cpu": "a", "usable_cores": 2, "native_isa": "avx2", "versions": {"torch": "1"}, "features": []}


def cell(peer: str, samples: list[float], status: str = "ok", **fields: Any) -> dict[str, Any]:
    base = {"level": "op", "workload": "layer_norm", "peer": peer, "ours": peer.startswith("minilm")}
    base |= {
        "precision": "fp32",
        "dtype": "float32",
        "device": "cpu",
        "threads": 2,
        "unit": "",
        "units_per_call": 1,
    }
    return {**base, "status": status, "reason": None, "samples": samples, "calls": 1, **fields}


def test_compare_tells_broken_new_and_gone() -> None:
    good = [1.0, 1.0, 1.0]
    before = Results(MACHINE, {}, [], [cell("minilm native", good), cell("old", good)])
    after = Results(
        {**MACHINE, "versions": {"torch": "2"}},
        {},
        [],
        [cell("minilm native", [], "wrong", reason="error 1"), cell("fresh", good)],
    )
    found = compare.compare(before, after)
    assert [(c.kind, c.peer) for c in found.changes] == [
        ("broken", "minilm native"),
        ("new", "fresh"),
        ("gone", "old"),
    ]
    assert len(found.worse) == 1
    assert found.cautions == ["torch 1 and 2"]


def test_compare_says_when_the_machine_itself_moved() -> None:
    def with_limit(value: float) -> Results:
        table = limits.Limits("cpu", "")
        for _ in range(3):
            table.add("read", 2, value)
        return Results(MACHINE, {}, [table], [])

    found = compare.compare(with_limit(30e9), with_limit(20e9))
    assert "read@2" in found.cautions[0]


def test_results_round_trip_and_refuse_what_they_are_not(tmp_path: Path) -> None:
    table = limits.Limits("cpu", "loops")
    table.add("read", 1, 2e10)
    written = Results(
        MACHINE, {"rounds": 3}, [table], [cell("minilm native", [0.5, 0.25], floor_seconds=0.1)]
    )
    path = tmp_path / "a.json"
    written.write(path)
    again = Results.read(path)
    assert again.cells == written.cells
    assert again.limits[0].get("read", 1) == 2e10
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]  # nothing partial
    assert share(again.cells[0]) == pytest.approx(0.1 / 0.375)
    data = json.loads(path.read_text())
    for broken, message in (
        ({**data, "schema": 99}, "schema 99"),
        ({"a": 1}, "not a result"),
        ([], "not a result"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(ResultError, match=message):
            Results.read(path)
    path.write_text("{")
    with pytest.raises(ResultError, match="not JSON"):
        Results.read(path)


# Limits
def test_the_limit_that_binds() -> None:
    table = limits.Limits("cpu", "")
    for name, value in (
        ("read", 20e9),
        ("copy", 10e9),
        ("fma", 100e9),
        ("int8", 400e9),
        ("gemm float32", 90e9),
    ):
        table.add(name, 2, value)
    assert table.floor(costs.Cost(read=20e9), "float32", 2) == (1.0, "read bandwidth")
    assert table.floor(costs.Cost(read=5e9, written=5e9), "float32", 2) == (1.0, "copy bandwidth")
    assert table.floor(costs.Cost(read=1e9, operations=300e9), "float32", 2) == (3.0, "fma")
    assert table.floor(costs.Cost(operations=800e9), "int8", 2) == (2.0, "int8")
    assert table.get("read", 7) == 20e9  # the nearest number of threads that was measured
    assert table.get("nothing", 1) == 0.0
    assert limits.Limits.from_dict(json.loads(json.dumps(table.to_dict()))).get("fma", 2) == 100e9


def test_without_a_compiler_the_limits_come_from_pytorch_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILM_BENCH_TINY", "1")
    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    probe = limits.CpuProbe([1])
    found = probe.round()
    assert "because no C++ compiler was found" in found.how
    assert found.get("read", 1) > 0
    assert found.get("copy", 1) > 0
    assert found.peak("float32", 1)[1] == "gemm float32"


def test_limits_that_contradict_other_loops_are_in_doubt() -> None:
    """The self-check of each run (`CpuProbe.doubts`), on rates that are made up: a processor of 3 GHz and two
    multiply-adds of 8 floats a clock."""
    good = {"read": 20e9, "copy": 14e9, "fma": 3e9 * 2 * 2 * 8, "clock": 3e9}
    others = {"read": 15e9, "copy": 16e9}

    def doubts(**changed: float) -> list[str]:
        table = limits.Limits("cpu", "")
        for name, value in {**good, **changed}.items():
            table.add(name, 1, 0.1 * value)  # a moment in which another program ran
            table.add(name, 1, value)
        return limits.contradictions(table, others, 8)

    assert doubts() == []
    for name, factor, words in (
        ("read", 4, "read bandwidth / that of NumPy is 5.33"),  # a loop that was optimised away
        ("copy", 0.5, "copy bandwidth / that of NumPy is 0.44"),  # bytes that were counted once
        ("fma", 0.2, "operations a clock / 16 is 0.40"),  # scalar code
        ("fma", 2, "operations a clock / 16 is 4.00"),
        ("clock", 1e-3, "the clock in GHz is 0.00"),
    ):
        found = doubts(**{name: factor * good[name]})
        assert any(doubt.startswith(words) for doubt in found), (name, factor, found)


def test_the_loops_move_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a clock: they fill, read and copy every element, with any number of threads."""
    monkeypatch.setenv("MINILM_BENCH_CACHE", str(tmp_path))
    loops, reason = limits.compiled_loops()
    if loops is None:
        pytest.skip(reason)
    n = 3 << 16
    for threads in (1, 2, 3):
        x, y = torch.full((n,), torch.nan), torch.full((n,), torch.nan)
        loops.fill(x.data_ptr(), n, threads)
        assert x.isfinite().all()
        assert loops.copy_all(x.data_ptr(), y.data_ptr(), n, threads) > 0
        assert torch.equal(x, y)
        assert loops.read_all(x.data_ptr(), n, threads) > 0
        assert loops.fma_all(1000, threads) > 0
    assert loops.float_lanes() in (4, 8, 16)
    assert loops.fma_operations() % (2 * loops.float_lanes()) == 0


# Costs
@given(st.integers(0, 12), st.integers(0, 12), st.booleans(), st.sampled_from([None, 1, 2, 5, 40]))
@settings(deadline=None, max_examples=150)
def test_visible_pairs_are_those_of_the_specification(
    new: int, past: int, causal: bool, window: int | None
) -> None:
    from minilm.ops.reference import visible

    context = new + past
    seen = visible(new, context, causal, window, torch.device("cpu"))
    expected = new * context if seen is None else int(seen.sum())
    assert costs.visible_pairs(new, context, causal, window) == expected


def test_costs_by_hand() -> None:
    # 10 x 4 floats: read 160 + parameters 32, written 160
    assert costs.layer_norm(10, 4).bytes == 160 + 160 + 32
    assert costs.add_layer_norm(10, 4).bytes == 4 * 160 + 32
    assert costs.rms_norm(10, 4, b=2, wb=2).bytes == 80 + 80 + 8
    full = costs.attention([128] * 2, 12, 12, 32, False)
    assert full.operations == 2 * 12 * 128 * 128 * (4 * 32 + 1)
    assert full.exponentials == 2 * 12 * 128 * 128
    assert full.bytes == 4 * 2 * 128 * 12 * 32 * 4
    half = costs.attention([128] * 2, 12, 12, 32, True)
    assert half.operations == full.operations * 129 / 256  # half, and the diagonal
    step = costs.paged_attention([1], [1000], 9, 3, 64)
    assert step.read == 9 * 64 * 4 + 2 * 1000 * 3 * 64 * 4 + 4 * 32
    q4 = costs.linear(1, 4096, 4096, wb=20 / 32, bias=False)
    assert q4.read == 4096 * 4 + 4096 * 4096 * 0.625
    assert q4.operations == 2 * 4096**2
    assert costs.gated(3, 5).bytes == 3 * 15 * 4
    loss = costs.linear_cross_entropy(10, 4, 100)
    assert loss.read == 160 + 1600 + 80
    assert loss.operations == 2 * 10 * 4 * 100 + 3000
    both = costs.linear_cross_entropy(10, 4, 100, backward=True)
    assert both.read == loss.read
    assert both.written == 4 + 160 + 1600
    assert both.operations == 6 * 10 * 4 * 100 + 5000


def test_quantised_weights_cost_the_bytes_that_they_have() -> None:
    for format in costs.WEIGHT_BYTES:
        weight = quantized.empty(format, 70, 96)
        assert costs.weight_bytes(format, 96, 70) == weight.nbytes
        cost = costs.quantized_linear(3, 96, 70, format)
        assert cost.read == pytest.approx(3 * 96 * 4 + weight.nbytes + 70 * 4)
        assert cost.operations == costs.linear(3, 96, 70).operations
    assert set(costs.WEIGHT_BYTES) == set(quantized.FORMATS)


def test_costs_of_whole_models_are_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINILM_BENCH_TINY", raising=False)
    spec = shapes.spec("MiniLM-L6")
    a_token = costs.total(costs.forward(spec, [128])).operations / 128
    assert a_token == pytest.approx(22.4e6, rel=0.03)  # a well-known figure for S = 128
    smol = shapes.spec("SmolLM2-135M")
    calls = costs.forward(smol, [1], contexts=[33], logits=1, cached=True)
    assert costs.total(calls).bytes == pytest.approx(134.5e6 * 4, rel=0.01)  # every weight once
    assert costs.total(calls).operations == pytest.approx(0.27e9, rel=0.03)


def test_costs_count_what_a_model_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of calls by formula is the list of calls that the model makes, with the same bytes and
    operations."""
    monkeypatch.setenv("MINILM_BENCH_TINY", "1")
    from minilm import backend
    from minilm.benchmarks.waterfall import Watch, passes

    for name in ("BERT-base", "GPT-2", "Llama-1B"):
        with torch.no_grad():
            model, situations = passes(name)
            for title, run in situations:
                watch = Watch("cpu")
                with watch.watching(), backend(blocks="reference", embed="reference"):  # else one call each
                    run()
                encoder = name in shapes.ENCODERS
                if encoder:
                    batch, length = map(int, title.split()[0:3:2])
                    expected = costs.forward(model.spec, [length] * batch)
                elif "prefill" in title:
                    expected = costs.forward(model.spec, [24], logits=1, cached=True)
                else:
                    context = int(title.split()[-2]) + 1
                    expected = costs.forward(model.spec, [1], contexts=[context], logits=1, cached=True)
                want: dict[str, list[float]] = {}
                for call in expected:
                    if call.op != "embedding":
                        entry = want.setdefault(call.op, [0, 0.0, 0.0])
                        entry[0] += call.count
                        entry[1] += call.cost.bytes * call.count
                        entry[2] += call.cost.operations * call.count
                got: dict[str, list[float]] = {}
                for step in watch.steps.values():
                    entry = got.setdefault(step.op, [0, 0.0, 0.0])
                    entry[0] += step.calls
                    entry[1] += step.cost.bytes * step.calls
                    entry[2] += step.cost.operations * step.calls
                got.get("linear", [0, 0, 0])[0] -= _poolers(got, want)
                assert {k: v[0] for k, v in got.items()} == {k: v[0] for k, v in want.items()}, (name, title)
                for op, (_, size, work) in want.items():
                    slack = 0.2 if op == "linear" and encoder else 1e-9  # the pooler, in a model this small
                    assert got[op][1] == pytest.approx(size, rel=slack), (name, title, op)
                    assert got[op][2] == pytest.approx(work, rel=slack), (name, title, op)


def _poolers(got: dict[str, list[float]], want: dict[str, list[float]]) -> float:
    """AutoModel's pooler is one more linear than the body has."""
    return 1 if got["linear"][0] == want["linear"][0] + 1 else 0


def test_geometric_mean() -> None:
    assert harness.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert math.isnan(harness.geometric_mean([]))


def test_times_of_cells_that_were_not_timed() -> None:
    assert times(cell("a", [], "wrong")) is None
    assert times(cell("a", [1.0], "skipped")) is None
    assert replace(harness.Settings(), rounds=2).rounds == 2
