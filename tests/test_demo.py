"""tools/demo.py: its verdicts can be bad, and its lines break where they should."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

FILE = Path(__file__).parent.parent / "tools" / "demo.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo: Any = load()
WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=12), max_size=30)


@given(WORDS, st.integers(12, 40), st.data())
def test_streamed_text_is_broken_between_words(words: list[str], width: int, data: st.DataObject) -> None:
    text = " ".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr(demo.sys, "stdout", SimpleNamespace(write=shown.append, flush=lambda: None))
        screen = demo.Wrapped(width)
        for piece in pieces:
            screen.write(piece)
        screen.end()
    lines = "".join(shown).splitlines()
    assert " ".join(lines).split() == words
    assert all(len(line) <= width and line == line.strip() for line in lines)


def record(folder: Path, model: str, cases: list[dict[str, Any]]) -> None:
    content = {"made_by": "a test", "versions": {"transformers": "9.9"}, "model": model, "cases": cases}
    (folder / f"{model}.json").write_text(json.dumps(content))


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(demo, "GOLDEN", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("off", "good"), [(0.0, True), (1e-6, True), (1e-4, False), (np.nan, False)])
def test_embeddings(golden: Path, off: float, good: bool, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = np.linspace(-1, 1, 12).reshape(3, 4)
    cases = [{"text": str(i), "embedding": vector.tolist()} for i, vector in enumerate(vectors)]
    record(golden, demo.ENCODER, cases)
    encoder = SimpleNamespace(encode=lambda texts: vectors[[int(t) for t in texts]] + off)
    assert demo.embeddings_agree(encoder) == good
    shown = capsys.readouterr().out
    assert "3 texts within" in shown
    assert "of transformers 9.9" in shown


@pytest.mark.parametrize(("ours", "same"), [([5, 6, 7], 5), ([5, 9, 7], 3), ([9, 6, 7], 2)])
def test_tokens(golden: Path, ours: list[int], same: int, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [{"prompt": "a", "prompt_token_ids": [1], "token_ids": [5, 6, 7]}]
    cases.append({"prompt": "b", "prompt_token_ids": [2, 3], "token_ids": [8, 8]})
    record(golden, demo.DECODER, cases)

    def generate(prompts: list[dict[str, list[int]]], params: list[Any], use_tqdm: bool) -> list[Any]:
        assert [prompt["prompt_token_ids"] for prompt in prompts] == [[1], [2, 3]]
        assert [p.max_tokens for p in params] == [3, 2]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in (ours, [8, 8])]

    assert demo.tokens_agree(SimpleNamespace(generate=generate)) == (same == 5)
    assert f"{same} of 5 greedy tokens" in capsys.readouterr().out


def test_without_a_record_nothing_is_claimed(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(golden, "some-other-model", [{"text": "a", "embedding": [1.0]}])
    assert demo.embeddings_agree(None)
    assert "unknown all-MiniLM-L6-v2" in capsys.readouterr().out
