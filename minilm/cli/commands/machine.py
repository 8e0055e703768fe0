"""`doctor`: this machine, and the implementations that will run on it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import command
from ..results import console, size

if TYPE_CHECKING:
    from rich.console import RenderableType


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(app, "doctor", panel="Machine", examples="minilm doctor\nminilm doctor --json")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Show what this machine has, which implementation of each op will run on it, and why not the others.

    Exit status 1 if minilm cannot work because something is missing.
    """
    from ...doctor import examine

    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        out = console()
        for part in (_machine(report), _packages(report), *_ops(report), _verdict(report)):
            out.print(part)
    if report["problems"]:
        raise typer.Exit(1)


def _grid(rows: list[tuple[str, str]], title: str) -> RenderableType:
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _machine(report: dict[str, Any]) -> RenderableType:
    cpu, memory, torch, extension = (report[key] for key in ("cpu", "memory", "torch", "extension"))
    rows = [
        ("minilm", f"{report['minilm']['version']} in {report['minilm']['folder']}"),
        ("Python", f"{report['python']['implementation']} {report['python']['version']}"),
        ("system", report["system"]["platform"]),
        ("CPU", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable"),
        ("", " ".join(cpu["features"]) or "instruction sets unknown"),
    ]
    if memory["total_bytes"]:
        limit = f", limited to {size(memory['limit_bytes'])}" if memory["limit_bytes"] else ""
        rows.append(
            ("memory", f"{size(memory['total_bytes'])}, {size(memory['available_bytes'] or 0)} free{limit}")
        )
    if torch is None:
        rows.append(("PyTorch", "does not load"))
    else:
        cuda = (
            f", CUDA {torch['cuda']}" if torch["cuda"] else f", ROCm {torch['hip']}" if torch["hip"] else ""
        )
        rows.append(
            (
                "PyTorch",
                f"{torch['version']}{cuda}, {torch['threads']} threads, uses {torch['cpu_capability']}",
            )
        )
    for index, gpu in enumerate(report["gpus"]):
        rows.append(
            (f"GPU {index}", f"{gpu['name']}, {size(gpu['memory_bytes'])}, compute {gpu['capability']}")
        )
    if not report["gpus"]:
        rows.append(("GPU", report["gpu_reason"]))
    if extension is not None:
        isas = ", ".join(extension["isas"])
        rows.append(
            ("extension", f"built; uses {extension['isa']} of {isas}" if extension["built"] else "not built")
        )
    for name, model in report["models"].items():
        rows.append(("model", f"{name}: {'installed' if model['path'] else 'not installed'}"))
    rows += [("environment", f"{name}={value}") for name, value in report["environment"].items()]
    return _grid(rows, "Machine")


def _packages(report: dict[str, Any]) -> RenderableType:
    rows = []
    for name, package in report["packages"].items():
        purpose = f"  (for {package['for']})" if package["for"] else ""
        rows.append((name, f"{package['version'] or 'not installed'}{purpose}"))
    return _grid(rows, "\nPackages")


def _ops(report: dict[str, Any]) -> list[RenderableType]:
    """One table per device; dtypes with the same choice for the same reasons share a row."""
    from rich.table import Table

    rows: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}
    for row in report["ops"]:
        answer = (row["backend"] or "nothing", row["error"] or _reasons(row["op"], row["refused"]))
        rows.setdefault((row["device"], row["op"]), {}).setdefault(answer, []).append(row["dtype"])
    tables: list[RenderableType] = []
    for device in dict.fromkeys(device for device, _ in rows):
        table = Table(
            title=f"\nOps on {device}", title_justify="left", title_style="bold", box=None, pad_edge=False
        )
        table.add_column("op", style="cyan", no_wrap=True)
        table.add_column("runs", style="green", no_wrap=True)
        table.add_column("others, and why not", overflow="fold")
        for (of, op), answers in rows.items():
            for (backend, why), dtypes in answers.items() if of == device else ():
                table.add_row(op if len(answers) == 1 else f"{op} {', '.join(dtypes)}", backend, why)
        tables.append(table)
    return tables


def _reasons(op: str, refused: dict[str, str]) -> str:
    """The informative reasons; backends with the same reason are joined."""
    backends: dict[str, list[str]] = {}
    for backend, reason in refused.items():
        if "order of preference" not in reason:
            short = reason.replace(f"there is no {backend} implementation of {op}", "not implemented")
            backends.setdefault(short, []).append(backend)
    return "\n".join(f"{', '.join(names)}: {reason}" for reason, names in backends.items()) or "-"


def _verdict(report: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    text = Text("\n")
    for problem in report["problems"]:
        text.append("problem: ", style="bold red").append(problem + "\n")
    for line in report["notes"]:
        text.append("note: ", style="yellow").append(line + "\n")
    if not report["problems"]:
        text.append("Everything that minilm needs is here.", style="green")
    return text
