"""Statistics of repetitions: median, 20/80 percentiles, whether two engines differ, whether a result has
changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_SPREAD = 0.30
"""A figure whose 20-80 % range is wider than this share of its median is shown with that range."""
FEWEST = 3
"""Minimum number of repetitions: fewer do not show the spread."""


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of `values` lie, interpolated linearly. Raises ValueError if there
    are none."""
    if not values:
        raise ValueError("no repeats, so no percentile")
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class Summary:
    """Median and the range that holds the middle 60 % of the repeats."""

    median: float
    p20: float
    p80: float
    repeats: int

    @property
    def spread(self) -> float:
        """(p80 - p20) / median."""
        return (self.p80 - self.p20) / self.median if self.median else 0.0


def summary(values: Sequence[float]) -> Summary:
    """The summary of at least one repeat."""
    return Summary(percentile(values, 0.5), percentile(values, 0.2), percentile(values, 0.8), len(values))


@dataclass(frozen=True)
class Ratio:
    """`value`: how many times faster the first is than the second. `reason`: why that is uncertain (a range
    that is too wide, too few repetitions), or None."""

    value: Summary
    reason: str | None = None

    @property
    def outcome(self) -> str:
        """won or lost if the middle 60 % of the ratios are on one side of 1, however wide their range. If
        they are on both sides: even, or unclear for a wide range. Also unclear for too few repetitions."""
        if self.value.repeats < FEWEST:
            return "unclear"
        if self.value.p80 < 1:
            return "lost"
        if self.value.p20 > 1:
            return "won"
        return "unclear" if self.reason else "even"

    def __str__(self) -> str:
        """1.30x faster; 4.35x slower; with its range if that is wide: 4.86x faster (4.11 to 5.73); even;
        unclear. A figure is never below 1."""
        outcome = self.outcome
        if outcome in ("even", "unclear"):
            return f"unclear: {self.reason}" if self.value.repeats < FEWEST else outcome
        slower = outcome == "lost"
        middle, low, high = (
            1 / v if slower else v for v in (self.value.median, self.value.p20, self.value.p80)
        )
        words = f"{figure(middle)}x {'slower' if slower else 'faster'}"
        if not self.reason:
            return words
        return f"{words} ({figure(min(low, high))} to {figure(max(low, high))})"


def figure(value: float) -> str:
    """A ratio with three digits: 1.30, 12.4, 130."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def ratio(ours: Sequence[float], other: Sequence[float], max_spread: float = MAX_SPREAD) -> Ratio:
    """other / ours, round by round: both were measured in the same rounds, so a slowdown of the machine
    affected both.

    If the numbers of repetitions differ, the medians are compared, with the extremes of both ranges as the
    spread."""
    if len(ours) == len(other):
        value = summary([b / a for a, b in zip(ours, other, strict=True)])
    else:
        a, b = summary(ours), summary(other)
        value = Summary(b.median / a.median, b.p20 / a.p80, b.p80 / a.p20, min(a.repeats, b.repeats))
    return Ratio(value, too_wide(value, max_spread))


def too_wide(value: Summary, max_spread: float = MAX_SPREAD) -> str | None:
    """None, or the reason why no figure is shown: the range of the middle 60 % of the repetitions is too
    wide."""
    if value.repeats < FEWEST:
        return f"too few repeats ({value.repeats})"
    if value.spread > max_spread:
        return f"spread too wide: {value.spread:.0%} of the median"
    return None


def moved(before: Sequence[float], after: Sequence[float], least: float = 0.05) -> float | None:
    """after / before of the medians if the difference is beyond the noise, otherwise None.

    Beyond the noise means: the 20-80 % ranges of the two runs do not overlap, and the medians differ by more
    than `least`."""
    a, b = summary(before), summary(after)
    apart = a.p80 < b.p20 or b.p80 < a.p20
    change = b.median / a.median
    return change if apart and abs(change - 1) > least else None
