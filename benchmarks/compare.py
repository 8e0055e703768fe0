"""``minilm bench --compare A.json B.json``: what changed by more than the noise."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Results, key, times
from .stats import moved


@dataclass(frozen=True)
class Change:
    """One measurement in two runs. `kind`: slower, faster, broken, mended, new, gone."""

    kind: str
    workload: str
    peer: str
    ours: bool
    before: float | None
    after: float | None
    """Median seconds a call."""
    reason: str = ""

    def __str__(self) -> str:
        name = f"{self.workload} · {self.peer}"
        if self.before is not None and self.after is not None:
            return f"{self.kind:7} {self.after / self.before:6.2f}x the time  {name}"
        return f"{self.kind:7} {name}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Comparison:
    """`changes`, the number of measurements that did not change, and reasons why the two runs are hard to
    compare."""

    changes: list[Change]
    alike: int
    cautions: list[str]

    @property
    def worse(self) -> list[Change]:
        """Results of minilm that became slower or wrong."""
        return [c for c in self.changes if c.ours and c.kind in ("slower", "broken")]


def compare(before: Results, after: Results) -> Comparison:
    """Cells of the same level, workload, engine, dtype, device and threads."""
    old = {key(c): c for c in before.cells}
    new = {key(c): c for c in after.cells}
    changes, alike = [], 0
    for name, cell in new.items():
        ours, workload, peer = cell["ours"], cell["workload"], cell["peer"]
        other = old.get(name)
        if other is None:
            changes.append(Change("new", workload, peer, ours, None, None))
            continue
        a, b = times(other), times(cell)
        if a is None or b is None:
            if a is not None:
                reason = f"{cell['status']}, {cell.get('reason') or ''}"
                changes.append(Change("broken", workload, peer, ours, None, None, reason))
            elif b is not None:
                changes.append(Change("mended", workload, peer, ours, None, None))
            continue
        change = moved(other["samples"], cell["samples"])
        if change is None:
            alike += 1
        else:
            kind = "slower" if change > 1 else "faster"
            changes.append(Change(kind, workload, peer, ours, a.median, b.median))
    changes += [
        Change("gone", c["workload"], c["peer"], c["ours"], None, None)
        for k, c in old.items()
        if k not in new
    ]
    order = ("broken", "slower", "faster", "mended", "new", "gone")
    changes.sort(key=lambda c: (order.index(c.kind), -abs((c.after or 1) / (c.before or 1) - 1)))
    return Comparison(changes, alike, _cautions(before, after))


def _cautions(before: Results, after: Results) -> list[str]:
    found = []
    for what in ("cpu", "usable_cores", "native_isa"):
        a, b = before.machine.get(what), after.machine.get(what)
        if a != b:
            found.append(f"the machines differ: {what} {a} and {b}")
    old = {limits.device: limits for limits in before.limits}
    for limits in after.limits:
        for name, limit in limits.table.items():
            other = old[limits.device].table.get(name) if limits.device in old else None
            change = moved(other.repeats, limit.repeats) if other else None
            if change is not None:
                found.append(
                    f"the machine's speed changed: {name} on {limits.device} is {change:.2f}x the earlier "
                    "value"
                )
    a, b = before.machine.get("versions", {}), after.machine.get("versions", {})
    found += [f"{k} {a.get(k)} and {b.get(k)}" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
    return found
