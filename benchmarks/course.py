"""The course of a run: what is done, what is left, how long that takes, and what the time does not allow.

A run announces its steps with the seconds that each takes on a quiet machine. From those that are done
follows how slow this machine is for steps of that kind, and from that the time left. With a limit, a step
that would not end in time is left out, and named in the results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Step:
    """One step that was announced. `kind`: steps whose guesses are wrong by the same factor."""

    kind: str
    name: str
    guess: float


@dataclass
class State:
    """What is shown to a person."""

    name: str
    done: int
    steps: int
    elapsed: float
    left: float
    """Seconds, an estimate."""


@dataclass
class Course:
    """A run with or without a limit of time. `show` is told each change."""

    limit: float = math.inf
    reserve: float = 0.0
    """Seconds of the limit that are kept for the end of the run."""
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
        """What follows may use this share of the time that is left of the limit, or until `end`; returns
        when that is over, by the clock."""
        now = self.clock()
        whole = (self._began + self.limit - self.reserve if end is None else end) - now
        self._end = now + share * max(0.0, whole)
        return self._end

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self.limit < math.inf

    def remaining(self) -> float:
        """Seconds until the end of the part under way; infinite without a limit."""
        return self._end - self.clock()

    def pace(self, kind: str) -> float:
        """How many times its guess a step of this kind takes here; of a kind that was not met, as the
        others."""
        known = sorted(self._paces.values())
        return self._paces.get(kind, known[len(known) // 2] if known else 1.0)

    def begin(self, kind: str, name: str, guess: float, *, needed: bool = False, told: str = "") -> bool:
        """Begin a step; False where the limit does not allow it (never for one that is `needed`), which is
        noted in `left_out` under its name, or as `told`."""
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
        """The step that was begun is over."""
        if self._now is None:
            return
        step, began = self._now
        self._done += 1
        taken = (self.clock() - began) / max(step.guess, 1e-3)
        before = self._paces.get(step.kind)
        self._paces[step.kind] = taken if before is None else 0.5 * (before + taken)
        self._now = None

    def drop(self, name: str) -> None:
        """An announced step is not needed."""
        if self._forget(name):
            self._steps -= 1

    def drop_all(self, prefix: str) -> None:
        """No announced step whose name begins so is needed."""
        for name in [step.name for step in self._planned if step.name.startswith(prefix)]:
            self.drop(name)

    def leave_out(self, name: str, step: str) -> None:
        """`step`, which was announced, is not done for want of time; people are told `name`."""
        self._forget(step)
        self._done += 1
        self.left_out.append(name)

    def state(self) -> State:
        """Where the run is."""
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
