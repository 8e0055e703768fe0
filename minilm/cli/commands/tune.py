"""`tune`: measures block sizes of the Triton kernels on this machine's GPU."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CommandError
from ..options import command, note
from ..progress import Progress, duration

if TYPE_CHECKING:
    import torch

CHIPS = ("sm_80", "sm_86", "sm_90", "sm_100")


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    examples = """
        minilm tune --model MiniLM-L6
        minilm tune --kernel attention,norm --dtype float16 --seconds 300
        minilm tune --model SmolLM2-135M --dry-run --chip sm_86
    """
    command(app, "tune", panel="Machine", examples=examples)(tune)


def tune(
    model: Annotated[
        str, typer.Option(metavar="NAMES", help="Models whose shapes are tuned, separated by commas; or all.")
    ] = "all",
    kernel: Annotated[
        str, typer.Option(metavar="NAMES", help="Kernels to tune, separated by commas; or all.")
    ] = "all",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="float32, float16 or bfloat16.")] = "bfloat16",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Table to extend; default: the one in the user's cache folder."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the candidates without measuring; needs no GPU.")
    ] = False,
    chip: Annotated[
        str,
        typer.Option(
            metavar="CHIP",
            help=f"GPU architecture for --dry-run on a machine without a GPU: {', '.join(CHIPS)}.",
        ),
    ] = "sm_90",
    most: Annotated[int, typer.Option(metavar="N", help="Maximum number of candidates per shape.")] = 24,
    seconds: Annotated[
        float,
        typer.Option(
            metavar="S",
            show_default=False,
            help="Start no new measurement after this many seconds; default: no limit.",
        ),
    ] = 0.0,
) -> None:
    """Measure block sizes of the Triton kernels on this GPU, and save those that are faster than the built-in
    choice.

    Each candidate is checked against float64 before it is timed. The results are saved in a table, which the
    kernels read before they apply their heuristics, on devices of the same name or compute capability."""
    if dry_run:  # before triton is imported: in its interpreter, listing would run the kernels
        os.environ["TRITON_INTERPRET"] = "0"
    note("reading PyTorch and Triton ...")
    import torch

    from ...model import as_dtype
    from ...ops.backends import triton

    if (reason := triton.unavailable()) is not None:
        raise CommandError(f"there is nothing to tune: {reason}")
    gpu = torch.cuda.is_available()
    if not gpu and not dry_run:
        raise CommandError(
            "tuning measures on a GPU, and this PyTorch sees no CUDA device "
            "(--dry-run lists what would be measured)"
        )
    if chip not in CHIPS:
        raise CommandError(f"unknown chip {chip!r}; expected {', '.join(CHIPS)}")
    chosen = as_dtype(dtype)
    assert chosen is not None
    if dry_run:
        _list(_models(model), kernel, chosen, chip, most)
    else:
        _measure(_models(model), kernel, chosen, output, most, seconds)


def _models(text: str) -> list[str]:
    from minilm.benchmarks import shapes

    names = list(shapes.HF_CONFIGS) if text == "all" else text.split(",")
    for name in names:
        if name not in shapes.HF_CONFIGS:
            raise CommandError(f"unknown model {name!r}; expected {', '.join(shapes.HF_CONFIGS)} or all")
    return names


def _kernels(text: str) -> list[str]:
    from minilm.kernels import heuristics, tuned

    assert heuristics  # registers its functions in the table
    names = list(tuned.ALL) if text == "all" else text.split(",")
    for name in names:
        if name not in tuned.ALL:
            raise CommandError(f"unknown kernel {name!r}; expected {', '.join(tuned.ALL)} or all")
    return names


def _list(models: list[str], kernel: str, dtype: torch.dtype, chip: str, most: int) -> None:
    import torch

    from minilm.benchmarks.tune import listing
    from minilm.kernels.devices import CHIPS, device_of

    device = device_of(torch.device("cuda")) if torch.cuda.is_available() else CHIPS[chip]
    total, now = 0, ["reading PyTorch and Triton"]
    progress = Progress(
        lambda: f"{now[0]} ...", quiet=sys.stdout.isatty()
    )  # a dry run prints its list instead
    with progress:
        for asked in listing(models, _kernels(kernel), dtype, device, partial(now.__setitem__, 0)):
            total += _candidates(asked, device, most)
    typer.echo(f"{total} candidates on {device.name}; nothing was measured")


def _candidates(asked: Any, device: Any, most: int) -> int:
    from minilm.kernels.candidates import candidates

    blocks = candidates(asked.kernel, asked.sizes, asked.answer, device)[:most]
    typer.echo(f"{asked.kernel}: {', '.join(f'{name} {value}' for name, value in asked.sizes.items())}")
    for block in blocks:
        mark = "  (the heuristic's)" if block == asked.answer else ""
        typer.echo("    " + ", ".join(f"{n} {v}" for n, v in block._asdict().items()) + mark)
    sys.stdout.flush()
    return len(blocks)


def _measure(
    models: list[str], kernel: str, dtype: torch.dtype, output: Path | None, most: int, seconds: float
) -> None:
    from minilm.benchmarks import tune as tuning
    from minilm.kernels import tuned

    path = output or tuned.own_path()
    if path is None:
        raise CommandError("MINILM_TUNED is empty, so there is no table to extend: give one with --output")
    found: list[dict[str, Any]] = []

    def keep(entry: dict[str, Any]) -> None:
        found.append(entry)
        tuning.add_entry(path, entry)

    began, limit = time.monotonic(), f" of {duration(seconds)}" if seconds else ""
    shapes = [0]

    def words() -> str:
        gone = duration(time.monotonic() - began)
        return f"tuning: {shapes[0]} shapes started, {len(found)} entries, {gone}{limit} elapsed"

    with Progress(words) as progress:

        def say(text: str) -> None:
            shapes[0] += not text.startswith(" ")
            progress.say(text)

        tuner = tuning.Tuner(dtype, "cuda", most=most, say=say)
        asked = tuning.tune(models, _kernels(kernel), tuner, keep, seconds or float("inf"))
    typer.echo(f"{len(found)} of {asked} shapes are faster than with the heuristics; {path}")
