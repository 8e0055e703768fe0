"""What tokenizers raise, and the border to the Rust library beneath them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TokenizerError(ValueError):
    """A tokenizer's file, its settings, or what it was asked to do is wrong; the message names which."""


@contextmanager
def backend_errors(doing: str) -> Iterator[None]:
    """Turns whatever the `tokenizers` library raises into TokenizerError("{doing}: ...").

    It raises bare `Exception`s, and damaged files make it panic; a panic arrives as
    pyo3_runtime.PanicException, which derives from BaseException so that nothing catches it by accident,
    and cannot be imported."""
    try:
        yield
    except TokenizerError:
        raise
    except Exception as problem:
        raise TokenizerError(f"{doing}: {problem}") from problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{doing}: the tokenizers library broke down: {problem}") from None
