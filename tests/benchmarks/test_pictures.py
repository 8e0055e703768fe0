"""The pictures and pages of the bench: who is faster, the wording, and names that do not overlap."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.benchmarks import drawing, markdown, page, report, standing, stats
from minilm.benchmarks.limits import Limits
from minilm.benchmarks.results import Results, rows

ENGINES = (
    *(("minilm", "fp32"), ("minilm reference", "fp32"), ("minilm bf16", "bf16"), ("minilm int8", "int8")),
    *(("minilm q8_0", "int8"), ("transformers sdpa", "fp32"), ("transformers eager", "fp32")),
    *(("transformers compiled", "fp32"), ("sentence-transformers", "fp32"), ("onnxruntime", "fp32")),
    *(("onnxruntime int8", "int8"), ("openvino", "fp32"), ("openvino bf16", "bf16"), ("ctranslate2", "fp32")),
    ("ctranslate2 int8", "int8"),
)


def cell(
    peer: str, precision: str, workload: str, seconds: float, threads: int = 2, **more: Any
) -> dict[str, Any]:
    found = {"peer": peer, "precision": precision, "ours": peer.startswith("minilm"), "status": "ok"}
    found |= {"level": "end to end", "model": "MiniLM-L6", "workload": workload, "unit": "sentences"}
    found |= {"units_per_call": 1, "threads": threads, "samples": [seconds, seconds * 1.01, seconds * 0.99]}
    return {"dtype": "float32", "device": "cpu", **found, **more}


def swept(threads: tuple[int, ...] = (2,)) -> list[dict[str, Any]]:
    """All engines over lengths and batches, many of them nearly as fast as each other."""
    cells = []
    for count in threads:
        for at, (peer, precision) in enumerate(ENGINES):
            for batch, length in ((1, 8), (1, 128), (1, 512), (4, 128), (32, 128)):
                seconds = batch * length * (1 + 0.001 * at) * 1e-4 / count
                more = {"units_per_call": batch, "threads": count}
                cells.append(cell(peer, precision, f"MiniLM-L6 sweep {batch} x {length}", seconds, **more))
    return cells


def machine() -> dict[str, Any]:
    found = {"cpu": "A", "usable_cores": 2, "native_isa": "avx2", "native_unavailable": None, "versions": {}}
    return {**found, "features": [], "architecture": "x86_64", "commit": "abc"}


# Words
@pytest.mark.parametrize(
    ("other", "words", "outcome"),
    [
        ([1.30, 1.31, 1.29], "1.30x faster", "won"),
        ([0.25, 0.26, 0.24], "4.00x slower", "lost"),
        ([12.5, 12.4, 12.6], "12.5x faster", "won"),
        ([0.005, 0.005, 0.005], "200x slower", "lost"),
        ([1.0, 1.02, 0.98], "even", "even"),
        ([3.5, 4.3, 4.9, 5.9, 6.1], "4.90x faster (4.14 to 5.94)", "won"),
        ([0.2, 0.25, 0.5], "4.00x slower (2.50 to 4.55)", "lost"),
        ([0.5, 1.1, 3.0], "unclear", "unclear"),
        ([2.0, 2.0], "unclear: too few repeats (2)", "unclear"),
    ],
)
def test_who_is_faster_in_words(other: list[float], words: str, outcome: str) -> None:
    found = stats.ratio([1.0] * len(other), other)
    assert (str(found), found.outcome) == (words, outcome)


@given(st.lists(st.floats(0.01, 100.0), min_size=3, max_size=9))
def test_a_ratio_is_never_below_one(other: list[float]) -> None:
    for figure in re.findall(r"[\d.]+", str(stats.ratio([1.0] * len(other), other))):
        assert float(figure) >= 1.0


# Pictures
@given(st.lists(st.floats(-50.0, 450.0), max_size=20), st.floats(0.0, 30.0))
def test_heights_are_apart_and_in_order(wanted: list[float], gap: float) -> None:
    found = drawing.apart(wanted, gap, 0.0, 400.0)
    gap = min(gap, 400.0 / max(len(wanted) - 1, 1))
    assert all(-1e-6 <= height <= 400 + 1e-6 for height in found)
    order = sorted(range(len(wanted)), key=lambda at: wanted[at])
    assert all(found[b] - found[a] >= gap - 1e-6 for a, b in pairwise(order))
    clear = sorted(wanted)
    if all(b - a > gap for a, b in pairwise(clear)) and all(0 <= w <= 400 for w in wanted):
        assert found == pytest.approx(wanted)  # who is in nobody's way stays


def test_an_engine_has_one_family_of_colours_and_a_mark_of_its_own() -> None:
    shades = {peer: drawing.colour(cell(peer, kind, "w", 1.0)) for peer, kind in ENGINES}
    assert len(set(shades.values())) > len(ENGINES) - 4
    for peer, kind in ENGINES:
        base = drawing.FAMILIES[peer.split()[0]] if "reference" not in peer else drawing.REFERENCE
        assert drawing.dark(cell(peer, kind, "w", 1.0)) == base
        low = max(int(base[at : at + 2], 16) - int(shades[peer][at : at + 2], 16) for at in (1, 3, 5))
        assert low <= 0, peer  # its family's, or paler
    found = drawing.marks([peer for peer, _ in ENGINES])
    assert len(set(found.values())) == len(ENGINES)


def boxes(figure: Any) -> list[tuple[str, Any]]:
    """Every text that is written beside a line or a point, and where."""
    from matplotlib.text import Annotation, Text

    figure.set_dpi(120)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    found = []
    for axes in figure.axes:
        for text in axes.texts:
            if isinstance(text, Annotation):
                found.append((text.get_text(), Text.get_window_extent(text, renderer)))
    return found


def overlapping(found: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [
        (a, b)
        for at, (a, one) in enumerate(found)
        for b, two in found[at + 1 :]
        if one.x0 < two.x1 and two.x0 < one.x1 and one.y0 + 2 < two.y1 and two.y0 + 2 < one.y1
    ]


def test_curves_name_every_line_once_without_overlaps() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from minilm.benchmarks import plots

    figures = plots.pictures(Results(machine(), {}, [], swept()))
    assert set(figures) == {"latency-length", "throughput-batch"}
    titles = {"latency-length": "time for one sequence", "throughput-batch": "sequences of 128 tokens"}
    for name, figure in figures.items():
        found = boxes(figure)
        assert sorted(text for text, _ in found) == sorted(peer for peer, _ in ENGINES)
        assert overlapping(found) == []
        width, height = figure.get_size_inches() * 120
        assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for _, box in found)
        assert titles[name] in figure.get_suptitle()
        assert "2 threads" in figure.get_suptitle()
        pyplot.close(figure)


def test_a_picture_of_batches_has_one_length_one_model_and_one_number_of_threads() -> None:
    pytest.importorskip("matplotlib")
    from minilm.benchmarks import curves

    more = swept((1, 2))
    more += [
        {**c, "workload": c["workload"].replace("128", "16")} for c in more if " 512" not in c["workload"]
    ]
    found = {picture.name: picture for picture in curves.all_pictures(Results(machine(), {}, [], more))}
    batches = sorted(name for name in found if name.startswith("throughput"))
    assert batches == [
        f"throughput-batch-minilm-l6-{t}-thread{'s' * (t > 1)}-{n}-tokens" for t in (1, 2) for n in (128, 16)
    ]
    picture = found["throughput-batch-minilm-l6-2-threads-16-tokens"]
    assert "sequences of 16 tokens" in picture.title
    assert [line.cell["peer"] for line in picture.lines] == [peer for peer, _ in ENGINES]
    for line in picture.lines:
        assert len({x for x, *_ in line.points}) == len(line.points) == 3  # nothing is there twice
    scaling = found["scaling"]
    for line in scaling.lines:
        assert line.points == [(1.0, 1.0, 1.0, 1.0), (2.0, *[pytest.approx(2.0)] * 3)]


def ops_of_all_kinds() -> list[dict[str, Any]]:
    cells = []
    for at, op in enumerate(
        ("layer_norm", "add_layer_norm", "rms_norm", "linear", "attention", "rope", "gated")
    ):
        for size in (1, 2):
            for peer, factor in (("minilm native", 1.0), ("minilm reference", 3.0)):
                work = {"bytes": 10**6, "operations": 4 * 10**5 * size * (1 + 0.05 * at), "op": op}
                seconds = 1e-4 * factor * size
                found = cell(peer, "fp32", f"{op} {size}", seconds, **work)
                cells.append({**found, "level": "op", "unit": "", "dtype": "float32"})
    return cells


def test_the_roofline_names_every_op_without_overlaps() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from minilm.benchmarks import plots

    limits = Limits("cpu", "made up")
    for name, value in (("read", 2e10), ("copy", 1.5e10), ("fma", 1e11)):
        for factor in (0.99, 1.0, 1.01):
            limits.add(name, 2, value * factor)
    figure = plots.pictures(Results(machine(), {}, [limits], ops_of_all_kinds()))["roofline"]
    found = boxes(figure)
    names = [text for text, _ in found if not text.startswith("limit")]
    assert sorted(names) == sorted(
        ["add layer norm", "attention", "gated", "layer norm", "linear", "rms norm", "rope"]
    )
    assert overlapping(found) == []
    (legend,) = [axes.get_legend() for axes in figure.axes]
    words = [text.get_text() for text in legend.get_texts()]
    assert "limit: reads memory at 20 GB/s" in words
    assert words[-1] == "hollow: minilm on plain PyTorch"
    pyplot.close(figure)


# Pages
def test_the_page_opens_with_the_newest_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, started in (
        ("a", "2026-03-01T10:00:00"),
        ("b", "2026-01-01T10:00:00"),
        ("c", "2026-02-01T10:00:00"),
    ):
        Results(machine(), {}, [], [cell("minilm", "fp32", "MiniLM-L6 1 x 16", 1.0)], {}, started).write(
            tmp_path / f"{name}.json"
        )
    text = page.build(tmp_path)
    assert re.findall(r'<h2 id="run\d">(.*?)</h2>', text) == ["a.json", "c.json", "b.json"]
    assert re.findall(r'<a href="#run\d">(.*?)</a>', text) == ["a.json", "c.json", "b.json"]
    assert "end to end · MiniLM-L6 · 1 timed" in text


def test_what_is_wide_scrolls_in_a_box_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [
        *(cell(peer, kind, "MiniLM-L6 1 x 16", 1.0 + at) for at, (peer, kind) in enumerate(ENGINES)),
    ]
    Results(machine(), {}, [], [*cells, *ops_of_all_kinds()]).write(tmp_path / "run.json")
    text = page.build(tmp_path)
    style, body = text[text.index("<style>") : text.index("</style>")], text[text.index("<body>") :]
    for tag in ("table", "img"):
        assert body.count(f"<{tag}") == len(re.findall(rf'<div class="wide"><{tag}', body)) > 0
    assert re.search(r"\.wide { overflow-x: auto", style)
    assert "ellipsis" not in style  # no name is cut
    assert 'content="width=device-width' in text
    narrow = style[style.index("@media (max-width") :]
    (columns,) = re.findall(r"\.row { grid-template-columns: ([^;]+);", narrow)
    fixed = sum(int(width) for width in re.findall(r"(\d+)px", columns))
    assert fixed <= 400 / 2  # the bars have the rest
    wide = style[: style.index("@media (max-width")]
    least = int(re.search(r"minmax\((\d+)px, 1fr\)\); gap: 16px", wide)[1])  # type: ignore[index]
    assert least > 400
    assert ".cards { grid-template-columns: 1fr; }" in narrow


def test_the_table_for_a_readme_names_the_nearest_engine() -> None:
    cells = [
        cell("minilm", "fp32", "MiniLM-L6 1 x 16", 0.10),
        cell("minilm reference", "fp32", "MiniLM-L6 1 x 16", 0.11),
        cell("quick", "fp32", "MiniLM-L6 1 x 16", 0.08),
        cell("slow", "fp32", "MiniLM-L6 1 x 16", 0.30),
        cell("minilm int8", "int8", "MiniLM-L6 1 x 16", 0.05),
        cell("other int8", "int8", "MiniLM-L6 1 x 16", 0.06),
        cell("minilm", "fp32", "MiniLM-L6 cold start", 2.0, unit="s"),
        cell("slow", "fp32", "MiniLM-L6 cold start", 3.0, unit="s"),
        cell("minilm int8", "int8", "MiniLM-L6 cold start", 1.0, unit="s"),
    ]
    assert markdown.overview(Results(machine(), {}, [], cells)).splitlines()[2:] == [
        "| 2 threads | 32-bit weights | 8-bit weights |",
        "|---|---|---|",
        "| MiniLM-L6, 1 x 16, sentences/s | **10**, **1.25x slower** than quick "
        "| **20**, 1.20x faster than other int8 |",
        "| MiniLM-L6, cold start, s | **2.00**, 1.50x faster than slow | **1.00** |",
    ]


def test_the_terminal_says_whose_variant_was_compared() -> None:
    cells = [
        cell("minilm", "fp32", "w", 1.0),
        cell("minilm int8", "int8", "w", 0.5),
        cell("x int8", "int8", "w", 4.0),
    ]
    (lines,) = [report.lines(found) for found in rows(cells).values()]
    assert {line.peer: line.ratio for line in lines}["x int8"] == "8.00x faster (minilm int8)"
    assert standing.counterpart(cells[2], cells) is cells[1]
