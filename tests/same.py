"""Results of pipelines, compared with those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def assert_same(found: Any, expected: Any, atol: float = 1e-5, path: str = "result") -> None:
    """The same structure and values; floats within `atol`, numpy's scalars count as floats if expected."""
    expected = expected.item() if isinstance(expected, np.generic) else expected
    if isinstance(expected, dict):
        assert isinstance(found, dict), f"{path}: {found!r}, expected {expected!r}"
        assert list(found) == list(expected), f"{path}: keys {list(found)}, expected {list(expected)}"
        for key in expected:
            assert_same(found[key], expected[key], atol, f"{path}[{key!r}]")
    elif isinstance(expected, list):
        assert isinstance(found, list), f"{path}: {found!r:.200}, expected a list"
        assert len(found) == len(expected), (
            f"{path}: {len(found)} items, expected {len(expected)}: {found!r:.500}"
        )
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, atol, f"{path}[{index}]")
    elif isinstance(expected, float):
        assert type(found) is float, f"{path}: {found!r}, expected a float"
        assert found == pytest.approx(expected, abs=atol), f"{path}: {found}, expected {expected}"
    else:
        assert type(found) is type(expected), f"{path}: {found!r}, expected {expected!r}"
        assert found == expected, f"{path}: {found!r}, expected {expected!r}"


class WholeTexts:
    """The backend of a transformers tokenizer, mended: tokenizers 0.23 stops reading a text at the
    truncation, so that windows lack what comes after (huggingface/tokenizers#2091)."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_batch(
        self, texts: list[Any], add_special_tokens: bool = True, is_pretokenized: bool = False
    ) -> list[Any]:
        """Read whole, then cut."""
        backend, truncation, processor = self.backend, self.backend.truncation, self.backend.post_processor
        if truncation is None:
            return list(backend.encode_batch(texts, is_pretokenized, add_special_tokens))
        backend.no_truncation()
        backend.post_processor = None
        both = [text if isinstance(text, tuple) else (text,) for text in texts]
        whole = [[backend.encode(part, is_pretokenized=is_pretokenized) for part in parts] for parts in both]
        backend.post_processor = processor
        backend.enable_truncation(**truncation)
        return [
            backend.post_process(*parts, None, add_special_tokens)
            if len(parts) == 1
            else backend.post_process(*parts, add_special_tokens)
            for parts in whole
        ]


def mend(pipeline: Any) -> Any:
    """A pipeline of transformers whose tokenizer gives whole windows."""
    pipeline.tokenizer._tokenizer = WholeTexts(pipeline.tokenizer._tokenizer)
    return pipeline
