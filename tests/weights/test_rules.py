"""Weight rules: patterns, and that they can be read in both directions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_family import (
    RULES,
)

from minilm.weights.rules import Rule, copy, fuse, ignore, transpose


@given(st.integers(0, 10**6), st.sampled_from([r for r in RULES if r.target]))
def test_rules_invert(number: int, rule: Rule) -> None:
    for source in (*rule.sources, *rule.also):
        key = source.replace("{i}", str(number))
        target = rule.match_key(key)
        assert target == rule.target.replace("{i}", str(number))
        assert target is not None
        sources, also = rule.match_target(target) or ((), ())
        assert key in (*sources, *also)


@pytest.mark.parametrize("number", ["01", "", "-1", "1.2", "1 ", "\u0663", "x", "1.up.weight\nh.1"])
def test_layer_numbers_are_plain_decimals(number: str) -> None:
    assert transpose("h.{i}.up.weight", "body.{i}.x").match_key(f"h.{number}.up.weight") is None


@pytest.mark.parametrize(
    "key", ["xh.1.up.weight", "h.1.up.weight2", "h.1.up_weight", "h.1.up.weight\n", "h.1"]
)
def test_pattern_is_a_whole_name(key: str) -> None:
    assert transpose("h.{i}.up.weight", "body.{i}.x").match_key(key) is None


def test_dot_and_star_are_only_themselves_outside_ignore() -> None:
    assert copy("a.b", "body.x").match_key("axb") is None
    assert copy("a.*", "body.x").match_key("a.b") is None
    assert ignore("a.*.{i}", "").match_key("a.b.c.12") is not None
    assert ignore("a.*", "").match_key("xa.b") is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: copy("h.{i}.x", "body.x"),
        lambda: copy("x", "body.{i}.x"),
        lambda: copy("h.{i}.{i}", "body.{i}"),
        lambda: copy("h.{j}.x", "body.x"),
        lambda: fuse(["h.{i}.q", "k"], "body.{i}.x"),
        lambda: fuse(["q", "q"], "body.x"),
    ],
)
def test_bad_rules_are_refused(make: Callable[[], Rule]) -> None:
    with pytest.raises(ValueError, match=r"pattern|target|twice"):
        make()
