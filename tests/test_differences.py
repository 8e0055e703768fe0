"""docs/differences.md: its rows have tests, and what differs in silence elsewhere is said once here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import pair
from strategies import small

import minilm
from minilm import differences
from minilm.families.family import Head

ROOT = Path(__file__).parent.parent
TABLE = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.splitlines()
    if line.startswith("| ") and not line.startswith(("| what", "| **"))
]

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [11, 12, 13, 0]])
LEFT = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10], [0, 11, 12, 13]])


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    """Each test hears its warnings."""
    before = set(differences.said)
    differences.said.clear()
    yield
    differences.said.clear()
    differences.said.update(before)


def heard(model: Any, *args: Any, **options: Any) -> list[str]:
    """The differences that a call tells of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(*args, **options)
    texts = [str(w.message).removesuffix("; see docs/differences.md") for w in caught]
    return [name for name, message in differences.DIFFERENCES.items() if message in texts]


# The table


def test_every_row_names_a_test_that_exists() -> None:
    assert len(ROWS) > 25
    for row in ROWS:
        assert len(row) == 5, row
        *cells, warns, named = row
        assert all(cells), row
        assert warns in ("yes", "no", "error"), row
        files = re.findall(r"`([^`]+)`", named)
        assert files, row
        for file in files:
            assert file.startswith("tests/"), row
            assert (ROOT / file).is_file(), row


def test_the_readme_leads_there() -> None:
    assert "(docs/differences.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_warning_leads_there_and_has_a_row() -> None:
    ours = [row for row in ROWS if row[3] == "yes" and "tests/test_differences.py" in row[4]]
    assert len(ours) == len(differences.DIFFERENCES)
    for name in differences.DIFFERENCES:
        with pytest.warns(UserWarning, match=r"see docs/differences\.md"):
            differences.tell(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in differences.DIFFERENCES:
            differences.tell(name)


def test_the_warning_is_of_the_line_of_the_program() -> None:
    config = minilm.BertConfig(hidden_size=12, num_attention_heads=3, num_hidden_layers=1, vocab_size=20)
    with pytest.warns(UserWarning, match="padded on the left") as caught:
        minilm.BertModel(config)(LEFT, (LEFT != 0).long())
    assert {Path(w.filename).name for w in caught} == {Path(__file__).name}


# Padding on the left


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
def test_padding_on_the_left_is_told_once(family: str) -> None:
    """Where transformers gives something else; what minilm gives is what each text gives alone."""
    with pair(small(family), "base") as p, torch.no_grad():
        mask = (LEFT != 0).long()
        assert heard(p.model, LEFT, mask)[:1] == ["left-padding"]
        assert "left-padding" not in heard(p.model, LEFT, mask)
        found = p.model(LEFT, mask).last_hidden_state
        theirs = p.reference(LEFT, attention_mask=mask).last_hidden_state
        for row, text in enumerate(LEFT):
            real = text != 0
            alone = p.model(text[real][None]).last_hidden_state[0]
            assert (found[row, real] - alone).abs().max() < 1e-5
            assert (found[row, ~real] == 0).all()
            assert ((theirs[row, real] - alone).abs().max() > 1e-3) == bool((~real).any())


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "roberta"])
def test_usual_batches_say_nothing(family: str) -> None:
    """Padding on the right, none at all, given positions, models that do not mind, and a row of padding."""
    with pair(small(family), "base") as p, torch.no_grad():
        assert heard(p.model, IDS, (IDS != 0).long()) == []
        assert heard(p.model, IDS) == []
        assert heard(p.model, IDS, torch.ones_like(IDS)) == []
        holes = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1]])
        assert heard(p.model, IDS, holes) == []
        if family not in ("bert", "roberta"):  # which have a pooler
            positions = ((LEFT != 0).long().cumsum(1) - 1).clamp(min=0)
            assert heard(p.model, LEFT, (LEFT != 0).long(), position_ids=positions) == []
        if family == "llama":
            assert heard(p.model, LEFT, (LEFT != 0).long()) == []


def test_generation_says_nothing() -> None:
    """Prompts padded on the left are the rule there, and transformers has the same positions."""
    config = minilm.GPT2Config(
        n_layer=1, n_embd=12, n_head=3, vocab_size=20, n_positions=16, eos_token_id=None
    )
    model = minilm.GPT2LMHeadModel(config).eval()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert heard(model.generate, LEFT, attention_mask=(LEFT != 0).long(), **options) == []


@pytest.mark.parametrize(("family", "head"), [("roberta", "sequence-classification"), ("bert", "base")])
def test_a_text_is_judged_by_its_own_first_token(family: str, head: Head) -> None:
    with pair(small(family), head) as p, torch.no_grad():
        pad = int(p.model.config.pad_token_id or 0)
        left = torch.where(LEFT == 0, pad, LEFT + 2)
        mask = (LEFT != 0).long()
        assert "first-token" in heard(p.model, left, mask)
        assert heard(p.model, left, mask) == []
        name = "logits" if head != "base" else "pooler_output"
        found, theirs = (m(left, attention_mask=mask)[name] for m in (p.model, p.reference))
        alone = torch.cat([p.model(row[m.bool()][None])[name] for row, m in zip(left, mask, strict=True)])
        assert (found - alone).abs().max() < 1e-5
        assert (theirs - alone)[1:].abs().max() > 1e-4


# Labels


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "token-classification"), ("bert", "masked-lm"), ("llama", "causal-lm")]
)
def test_labels_at_padding_are_told_once(family: str, head: Head) -> None:
    """The loss of minilm is that of transformers with -100 at padding."""
    with pair(small(family), head, num_labels=20) as p, torch.no_grad():
        mask = (IDS != 0).long()
        clean = IDS.masked_fill(mask == 0, -100)
        assert heard(p.model, IDS, mask, labels=clean) == []
        assert heard(p.model, IDS, labels=IDS) == []
        assert heard(p.model, IDS, mask, labels=IDS) == ["labels-at-padding"]
        assert heard(p.model, IDS, mask, labels=IDS) == []
        found = p.model(IDS, mask, labels=IDS).loss
        assert torch.equal(found, p.model(IDS, mask, labels=clean).loss)
        assert (found - p.reference(IDS, attention_mask=mask, labels=clean).loss).abs() < 1e-4
        assert (found - p.reference(IDS, attention_mask=mask, labels=IDS).loss).abs() > 1e-3


def test_the_first_token_is_not_predicted_from_padding() -> None:
    with pair(small("llama"), "causal-lm") as p, torch.no_grad():
        mask = (LEFT != 0).long()
        clean = LEFT.masked_fill(mask == 0, -100)
        first = clean.masked_fill((mask.cumsum(1) == 1) & (mask == 1), -100)
        assert heard(p.model, LEFT, mask, labels=first) == []
        assert heard(p.model, LEFT, mask, labels=clean) == ["labels-after-padding"]
        assert heard(p.model, LEFT, mask, labels=clean) == []
        found = p.model(LEFT, mask, labels=clean).loss
        assert torch.equal(found, p.model(LEFT, mask, labels=first).loss)
        assert (found - p.reference(LEFT, attention_mask=mask, labels=first).loss).abs() < 1e-4
        assert (found - p.reference(LEFT, attention_mask=mask, labels=clean).loss).abs() > 1e-4


def test_a_device_is_asked_in_one_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of training but one waits for the labels, whether or not there is something to tell."""
    from minilm.model import heads
    from minilm.model.batch import pack

    looks: list[str] = []

    class Labels:
        """As far as they are looked at."""

        device = torch.device("cuda")

        def __ne__(self, other: object) -> Any:
            looks.append("labels")
            return IDS != -100

        __hash__ = None  # type: ignore[assignment]

    packed = pack(3, 4, (IDS != 0).long(), torch.device("cpu"))
    targets = packed.pack(IDS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            heads._tell_of_padding(Labels(), targets, packed, False)  # type: ignore[arg-type]
    assert len(looks) == 1
    assert len(caught) == 1
    whole = pack(3, 4, None, torch.device("cpu"))
    differences.said.clear()
    heads._tell_of_padding(Labels(), whole.pack(IDS), whole, False)  # type: ignore[arg-type]
    assert len(looks) == 1
