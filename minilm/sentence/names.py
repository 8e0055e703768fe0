"""Argument names and orders of current and older sentence-transformers releases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

from ..differences import renamed

F = TypeVar("F", bound=Callable[..., Any])

_UNSET = ("prompt", "prompt_name", "pool", "chunk_size", "device")
"""Options of some versions, which have no effect as long as they are None."""


def answering_to(
    *,
    older: Mapping[str, str] = {},
    also: Mapping[str, str] = {},
    order: Callable[[Sequence[Any]], Sequence[str]],
    places: int = 1,
    without_effect: Sequence[str] = (),
) -> Callable[[F], F]:
    """Decorator that makes a method accept `older` names, which warn once, other names (`also`), and more
    than `places` positional arguments, whose names `order` determines from their values. Options
    `without_effect` are dropped."""

    def wrap(function: F) -> F:
        who = function.__qualname__.removesuffix(".__init__")
        other = frozenset((*older, *also, *without_effect, *_UNSET))

        @wraps(function)
        def call(self: Any, *args: Any, **options: Any) -> Any:
            if len(args) <= places and other.isdisjoint(options):  # the usual call
                return function(self, *args, **options)
            options = renamed(who, options, older)
            for name, ours in also.items():
                if name in options:
                    if ours in options or args:
                        raise TypeError(f"{who}: {name} is another name of {ours}, and both are given")
                    options[ours] = options.pop(name)
            rest = args[places:]
            if rest:
                names = order(rest)
                if len(rest) > len(names):
                    raise TypeError(f"{who} takes at most {places + len(names)} arguments by position")
                for name, value in zip(names, rest, strict=False):
                    if name in options:
                        raise TypeError(f"{who} got two values for {name}")
                    options[name] = value
            for name in (*without_effect, *(n for n in _UNSET if options.get(n, 0) is None)):
                options.pop(name, None)
            return function(self, *args[:places], **options)

        return cast("F", call)

    return wrap
