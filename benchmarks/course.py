"""The progress of a run: steps done and left, the remaining time, and the steps that a time limit excludes.

A run announces its steps with the seconds that each takes on an idle machine. Finished steps show by what
factor this machine is slower for steps of that kind, which gives the remaining time. If there is a limit, a
step that would not end in time is left out, and named in the results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Step:
    """One announced step. `kind`: steps whose estimates are wrong by the same factor."""

    kind: str
    name: str
    guess: float


@dataclass
class State:
    """The state that is shown to the user."""

    name: str
    done: int
    steps: int
    elapsed: float
    left: float
    """Seconds, an estimate."""


@dataclass
class Course:
    """A run with or without a time limit. `show` is called with each change."""

    limit: float = math.inf
    reserve: float = 0.0
    """Seconds of the limit that are reserved for the end of the run."""
    show: Callable[[State], None] = lambda state: None
    clock: Callable[[], float] = time.monotonic
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = self.clock()
        self._end = self._began + self.limit
        self._planned: list[Step] = []
        self._paces: dict[str, float] = {}
        self._steps = self._done = 0
        self._now: tuple[Step, float] | None = None

    def plan(self, steps: Sequence[Step]) -> None:
        """Announce steps, in any order."""
        self._planned += steps
        self._steps += len(steps)

    def within(self, share: float, end: float | None = None) -> float:
        """Let the next steps use this share of the remaining time, or until `end`; returns the clock time
        when it ends."""
        now = self.clock()
        whole = (self._began + self.limit - self.reserve if end is None else end) - now
        self._end = now + share * max(0.0, whole)
        return self._end

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self.limit < math.inf

    def remaining(self) -> float:
        """Seconds until the end of the current part; infinite without a limit."""
        return self._end - self.clock()

    def pace(self, kind: str) -> float:
        """The ratio of measured to estimated time for steps of this kind; for a kind without finished steps,
        that of the others."""
        known = sorted(self._paces.values())
        return self._paces.get(kind, known[len(known) // 2] if known else 1.0)

    def begin(self, kind: str, name: str, guess: float, *, needed: bool = False, told: str = "") -> bool:
        """Begin a step; returns False if the limit does not allow it (never for one that is `needed`), and
        adds its name, or `told`, to `left_out`."""
        self._forget(name)
        step = Step(kind, name, guess)
        if not needed and guess * self.pace(kind) > self.remaining():
            self.left_out.append(told or name)
            self._done += 1
            return False
        self._now = (step, self.clock())
        self.tell()
        return True

    def end(self) -> None:
        """End the current step."""
        if self._now is None:
            return
        step, began = self._now
        self._done += 1
        taken = (self.clock() - began) / max(step.guess, 1e-3)
        before = self._paces.get(step.kind)
        self._paces[step.kind] = taken if before is None else 0.5 * (before + taken)
        self._now = None

    def drop(self, name: str) -> None:
        """Remove an announced step that is not needed."""
        if self._forget(name):
            self._steps -= 1

    def drop_all(self, prefix: str) -> None:
        """Remove all announced steps whose name begins with this."""
        for name in [step.name for step in self._planned if step.name.startswith(prefix)]:
            self.drop(name)

    def leave_out(self, name: str, step: str) -> None:
        """Leave out an announced step for lack of time; `name` is shown to the user."""
        self._forget(step)
        self._done += 1
        self.left_out.append(name)

    def state(self) -> State:
        """The state of the run."""
        name, under_way = "", 0.0
        if self._now is not None:
            step, began = self._now
            name = step.name
            under_way = max(0.0, step.guess * self.pace(step.kind) - (self.clock() - began))
        left = under_way + sum(step.guess * self.pace(step.kind) for step in self._planned)
        elapsed = self.clock() - self._began
        steps = max(self._steps, self._done + (self._now is not None))
        return State(name, self._done, steps, elapsed, min(left, max(0.0, self.limit - elapsed)))

    def tell(self) -> None:
        """Show the state."""
        self.show(self.state())

    def _forget(self, name: str) -> bool:
        for step in self._planned:
            if step.name == name:
                self._planned.remove(step)
                return True
        return False
