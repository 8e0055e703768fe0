"""The JSON file of a run: one schema, with all repetitions."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .limits import Limits
from .stats import Summary, summary

SCHEMA = 1


class ResultError(ValueError):
    """Raised if a file is not a result of this bench, or has another schema."""


@dataclass
class Results:
    """One run. `cells` holds one dict for each engine on each workload:

    level, model, workload, peer, ours, precision, dtype, device, threads; status ("ok", "wrong", "skipped",
    "failed") and reason; check (ok, error, allowed, detail); samples (seconds a call, one a round), calls
    (in one block); unit and units_per_call; bytes, operations, floor_seconds and binding (the limit)."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    limits: list[Limits] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    started: str = field(default_factory=lambda: _now())
    finished: str = ""

    def write(self, path: Path) -> None:
        """Write to a temporary name, then rename: no partial file is left."""
        self.finished = _now()
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "schema": SCHEMA,
            "kind": "minilm bench",
            "started": self.started,
            "finished": self.finished,
            "machine": self.machine,
            "settings": self.settings,
            "notes": self.notes,
            "limits": [limits.to_dict() for limits in self.limits],
            "cells": [_rounded(cell) for cell in self.cells],
        }
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises ResultError for a file that is not a result of this bench."""
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise ResultError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise ResultError(f"{path} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("kind") != "minilm bench":
            raise ResultError(f"{path} is not a result of minilm bench")
        if data.get("schema") != SCHEMA:
            raise ResultError(f"{path} has schema {data.get('schema')!r}, and this program reads {SCHEMA}")
        limits = [Limits.from_dict(entry) for entry in data["limits"]]
        rest = (data["cells"], data.get("notes", {}), data["started"], data["finished"])
        return cls(data["machine"], data["settings"], limits, *rest)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _rounded(value: Any) -> Any:
    """Round floats to six significant digits: timers are not more precise, and files stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """The key by which cells of two runs are the same measurement."""
    return (cell["level"], cell["workload"], cell["peer"], cell["dtype"], cell["device"], cell["threads"])


def place(cell: dict[str, Any]) -> tuple[Any, ...]:
    """The key that the cells of one row of a table share: they were measured in the same rounds."""
    return (cell["level"], cell["workload"], cell["dtype"], cell["device"], cell["threads"])


def times(cell: dict[str, Any]) -> Summary | None:
    """Seconds per call, or None if the cell was not timed."""
    return summary(cell["samples"]) if cell.get("status") == "ok" and cell.get("samples") else None


def share(cell: dict[str, Any]) -> float | None:
    """The time allowed by the limit divided by the measured time, 0..1 (above 1 if the machine was slower
    when the limit was measured)."""
    taken = times(cell)
    floor = cell.get("floor_seconds")
    return floor / taken.median if taken and floor else None


def rows(cells: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Cells by `place`, in order of appearance."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault(place(cell), []).append(cell)
    return found
