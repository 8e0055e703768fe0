"""`TokenizerError`, and the conversion of errors of the Rust library `tokenizers` into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TokenizerError(ValueError):
    """A tokenizer's file, its settings or the arguments of a call are wrong; the message names which."""


@contextmanager
def backend_errors(doing: str) -> Iterator[None]:
    """Convert all errors of the `tokenizers` library into TokenizerError("{doing}: ...").

    It raises bare `Exception`s, and damaged files make it panic. A panic becomes a
    pyo3_runtime.PanicException, which derives from BaseException, so that nothing catches it by accident, and
    cannot be imported."""
    try:
        yield
    except TokenizerError:
        raise
    except Exception as problem:
        raise TokenizerError(f"{doing}: {problem}") from problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{doing}: the tokenizers library crashed: {problem}") from None
