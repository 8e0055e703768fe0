"""`bench`: checks results, then measures speed, in comparison with the machine's limits and with other
libraries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CommandError, note
from ..options import command
from ..progress import Progress, duration
from ..results import console

if TYPE_CHECKING:
    from minilm.benchmarks.results import Results
    from minilm.benchmarks.run import Plan

LEVELS = ("op", "layer", "e2e", "sweep")
QUICK_SECONDS = 120.0
NOTHING_TO_COMPILE = "^(?!.*([Cc]ompile|Flex))"
"""Engines of --quick: without those that compile first, which takes minutes."""


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    examples = """
        minilm bench --quick
        minilm bench --level e2e --model MiniLM-L6 --threads 1,2 --output results
        minilm bench --level op --only "add_layer_norm" --peers "minilm|compile"
        minilm bench --compare before.json after.json
        minilm bench --explain MiniLM-L6
        minilm bench --html results
        minilm bench --markdown results/run.json --threads 2
    """
    command(app, "bench", panel="Machine", examples=examples)(bench)


def bench(
    level: Annotated[
        str,
        typer.Option(
            metavar="LEVELS",
            help=f"Levels to run, separated by commas: {', '.join(LEVELS)}, or all (op: "
            "single ops; layer: one block of a model; e2e: whole models; sweep: "
            "several lengths and batch sizes).",
        ),
    ] = "op,layer,e2e",
    model: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Models, or models whose shapes are used, separated by commas; or all."
        ),
    ] = "all",
    only: Annotated[
        str, typer.Option(metavar="REGEX", help="Only workloads whose name matches this regular expression.")
    ] = "",
    peers: Annotated[
        str, typer.Option(metavar="REGEX", help="Only engines whose name matches this regular expression.")
    ] = "",
    threads: Annotated[
        str,
        typer.Option(
            metavar="NUMBERS", help="Numbers of threads, separated by commas; all: as many as cores."
        ),
    ] = "all",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str,
        typer.Option(metavar="DTYPE", help="dtype of ops and layers; default: float32, on a GPU float16."),
    ] = "",
    rounds: Annotated[
        int, typer.Option(metavar="N", show_default=False, help="Repetitions per engine; default: 15.")
    ] = 0,
    budget: Annotated[
        float,
        typer.Option(
            metavar="S",
            show_default=False,
            help="Seconds per workload, for all engines together; default: 20.",
        ),
    ] = 0.0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A run of two minutes with MiniLM and SmolLM2; it lists what there was no time for.",
        ),
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(
            metavar="S", show_default=False, help="Time limit for the whole run in seconds; default: none."
        ),
    ] = 0.0,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the results: JSON, pictures and an HTML page."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Show what changed between two results by more than the noise."),
    ] = None,
    explain: Annotated[
        str, typer.Option(metavar="MODEL", help="Show the time of each op in a forward pass of this model.")
    ] = "",
    html: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the HTML page and README.md of a folder of results."),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Print a result as Markdown tables (with --model, --threads)."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="List the engines, with the reason if one cannot run.")
    ] = False,
) -> None:
    """Measure the speed of ops, layers and whole models, compared with other libraries.

    Only engines with correct results are timed. Exit status 1: a result of minilm was wrong, or
    (--compare) minilm became slower.
    """
    from minilm.benchmarks.machine import tiny

    if compare is not None:
        _compare(*compare)
    elif html is not None:
        from minilm.benchmarks import markdown as tables
        from minilm.benchmarks import page

        typer.echo(str(page.write(html)))
        if (readme := tables.write(html)) is not None:
            typer.echo(str(readme))
    elif markdown is not None:
        _markdown(markdown, model, threads)
    elif explain:
        from minilm.benchmarks import waterfall

        waterfall.show(explain, threads=_threads(threads)[-1], device=device, console=console())
    elif show:
        _list(device)
    else:
        _check(level, model, device, seconds)
        limit = seconds or (QUICK_SECONDS if quick else math.inf)
        with Progress(words := Words(limit)) as progress:
            plan = _plan(level, model, threads, device, dtype, rounds, budget, quick or tiny())
            plan.only, plan.peers = only, peers or (NOTHING_TO_COMPILE if quick else "")
            plan.say = progress.say
            plan.course = words.course
            target = _target(plan, output)
            results = _run(plan, target)
        _show(results, target)


class Words:
    """The progress text: position in the run, elapsed time, estimated remaining time."""

    def __init__(self, limit: float) -> None:
        from minilm.benchmarks.course import Course

        self.course = Course(limit)

    def __call__(self) -> str:
        state = self.course.state()
        if not state.steps:
            return "reading PyTorch ..."
        left = f"about {duration(state.left)} left"
        return f"{state.done} of {state.steps}, {duration(state.elapsed)} elapsed, {left}: {state.name}"


def _threads(text: str) -> list[int]:
    from minilm.benchmarks.run import usable_cores

    if text == "all":
        return [usable_cores()]
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise CommandError(f"--threads must be numbers separated by commas, such as 1,2, and is {text!r}")
    return found


def _check(level: str, model: str, device: str, seconds: float) -> None:
    """Check the options that can be checked without importing PyTorch."""
    for name in LEVELS if level == "all" else level.split(","):
        if name not in LEVELS:
            raise CommandError(f"unknown level {name!r}; expected {', '.join(LEVELS)} or all")
    if device not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda, and is {device!r}")
    if seconds < 0 or math.isnan(seconds):
        raise CommandError(f"--seconds must be at least 0, and is {seconds:g}")


def _plan(
    level: str, model: str, threads: str, device: str, dtype: str, rounds: int, budget: float, quick: bool
) -> Plan:
    from dataclasses import replace

    import torch

    from minilm.benchmarks import shapes
    from minilm.benchmarks.harness import Settings
    from minilm.benchmarks.run import Plan

    levels = list(LEVELS) if level == "all" else level.split(",")
    everything = ["MiniLM-L6", "SmolLM2-135M"] if quick else list(shapes.HF_CONFIGS)
    models = everything if model == "all" else model.split(",")
    for name in models:
        if name not in shapes.HF_CONFIGS:
            raise CommandError(f"unknown model {name!r}; expected {', '.join(shapes.HF_CONFIGS)} or all")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: this PyTorch sees no CUDA device")
    settings = Settings.default()
    if quick:
        settings = replace(settings, rounds=min(settings.rounds, 5), budget_seconds=1.0, least_rounds=3)
    if rounds:
        settings = replace(settings, rounds=rounds, least_rounds=min(rounds, settings.least_rounds))
    if budget:
        settings = replace(settings, budget_seconds=budget)
    return Plan(
        limit_rounds=2 if quick else Plan.limit_rounds,
        levels=levels,
        models=models,
        threads=_threads(threads),
        device=device,
        dtype=dtype or ("float32" if device == "cpu" else "float16"),
        settings=settings,
    )


def _target(plan: Plan, output: Path | None) -> Path | None:
    """The file for the results."""
    import time

    from minilm.benchmarks import machine

    if output is None:
        return None
    folder: Path = output / machine.short_name(machine.describe(plan.device))
    return folder / f"{time.strftime('%Y-%m-%d-%H%M')}-{'-'.join(plan.levels)}.json"


def _run(plan: Plan, target: Path | None) -> Results:
    """Measure; the results so far are written to `target` after each workload."""
    from minilm.benchmarks.run import run

    def keep(results: Results) -> None:
        if target is not None:
            results.write(target)

    results = run(plan, on_cell=keep)
    keep(results)
    return results


def _show(results: Results, target: Path | None) -> None:
    from minilm.benchmarks import markdown, page, plots, report

    report.print_tables(results, console())
    if target is not None:
        typer.echo(str(target))
        try:
            pictures = plots.save(results, target.parent / "pictures")
            typer.echo(str(page.write(target.parent)))
            markdown.write(target.parent)
            note(f"{len(pictures)} pictures in {target.parent / 'pictures'}")
        except ImportError as error:
            note(f"no pictures and no page: {error} (make bench-peers)")
    if any(cell["ours"] and cell["status"] in ("wrong", "failed") for cell in results.cells):
        raise typer.Exit(1)


def _compare(before: Path, after: Path) -> None:
    from minilm.benchmarks.compare import compare
    from minilm.benchmarks.results import Results

    found = compare(Results.read(before), Results.read(after))
    for caution in found.cautions:
        note(caution)
    for change in found.changes:
        typer.echo(str(change))
    typer.echo(f"{found.alike} measurements are equal within the noise, {len(found.changes)} differ")
    if found.worse:
        raise typer.Exit(1)


def _markdown(path: Path, models: str, threads: str) -> None:
    from minilm.benchmarks.markdown import overview, tables
    from minilm.benchmarks.results import Results

    chosen = [] if models == "all" else models.split(",")
    many = None if threads == "all" else _threads(threads)[-1]
    results = Results.read(path)
    found = tables(results, chosen, many)
    if not found:
        raise CommandError(f"{path} has no end-to-end results for that model and number of threads")
    typer.echo(f"{overview(results, chosen, many)}\n{found}", nl=False)


def _list(device: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from minilm.benchmarks import peers

    title = "Engines of the end-to-end level"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("engine", style="cyan", no_wrap=True)
    table.add_column("runs")
    table.add_column("weights", no_wrap=True)
    table.add_column("here", no_wrap=True)
    reasons: dict[str, list[str]] = {}
    for name in peers.ENGINES:
        kind = peers.engine_class(name)
        runs = ", ".join(k for k, yes in (("encoders", kind.encoder), ("decoders", kind.decoder)) if yes)
        reason = kind.unavailable(device)
        table.add_row(
            name, runs, kind.precision, Text("no", style="dim") if reason else Text("yes", style="green")
        )
        if reason:
            reasons.setdefault(reason, []).append(name)
    out = console()
    out.print(table)
    for reason, names in reasons.items():
        out.print(Text(f"no {', '.join(names)}: {reason}", style="dim"))
