"""Whatever kills a process that saves, converts or quantises: the folder loads as the old model or as the new
one, and computes what that one does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from killed import killed_everywhere

import minilm
from minilm.conversion import convert, quantize
from minilm.sentence import CrossEncoder, SentenceEncoder

IDS = torch.tensor([[5, 6, 7, 11]])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A forked child has none of its parent's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decoder(seed: int, weights: str | None = None) -> Any:
    torch.manual_seed(seed)
    options = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4}
    config = minilm.AutoConfig.for_model("llama", **options, **heads, rms_norm_eps=10.0**-seed)
    return minilm.AutoModelForCausalLM.from_config(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def by_formula(folder: Path) -> torch.Tensor:
    """What transformers computes from a folder that nothing is wrong with."""
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def check(
    tmp_path: Path, old: Callable[[Path], None], new: Callable[[Path], None], answer: Callable[[Path], Any]
) -> None:
    """`answer` of a folder that `new` was killed in must be that of an undisturbed one, old or new."""
    wanted = []
    for name, save in (("old", old), ("new", new)):
        save(tmp_path / name)
        wanted.append(answer(tmp_path / name))
    assert not torch.allclose(*wanted, atol=1e-2)
    top, found = tmp_path / "top", []
    folder = top / "m"

    def fresh() -> None:
        shutil.rmtree(top, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        (folder / "thesis.txt").write_text("mine")

    for number in killed_everywhere(lambda: new(folder), top, fresh):
        got = answer(folder)
        same = [torch.allclose(got, each, atol=1e-5) for each in wanted]
        assert any(same), f"a mixture after being killed at change {number}"
        found.append(same.index(True))
        assert (folder / "thesis.txt").read_text() == "mine"
    assert found == sorted(found), "once new, always new"
    assert set(found) == {0, 1}
    new(folder)
    left = sorted(f.relative_to(folder) for f in folder.rglob("*") if f.is_file())
    assert [f for f in left if f.parts[0].startswith(".")] == []


SHARDED = {"max_shard_size": "20KB"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(SHARDED, SHARDED, id="sharded"),
        pytest.param({}, SHARDED, id="single-to-sharded"),
        pytest.param(SHARDED, {}, id="sharded-to-single", marks=pytest.mark.slow),
        pytest.param({}, {}, id="single", marks=pytest.mark.slow),
    ],
)
def test_save_pretrained(tmp_path: Path, before: dict[str, str], after: dict[str, str]) -> None:
    first, second = decoder(1), decoder(2)
    check(
        tmp_path,
        lambda folder: first.save_pretrained(folder, **before),
        lambda folder: second.save_pretrained(folder, **after),
        lambda folder: logits(minilm.AutoModelForCausalLM.from_pretrained(folder)),
    )
    assert torch.allclose(by_formula(tmp_path / "top" / "m"), logits(second), atol=1e-4)


def test_quantised_over_floating(tmp_path: Path) -> None:
    decoder(2).save_pretrained(tmp_path / "plain")
    second = minilm.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", weights="q8")
    check(
        tmp_path,
        lambda folder: decoder(1).save_pretrained(folder),
        lambda folder: second.save_pretrained(folder, **SHARDED),
        lambda folder: logits(minilm.AutoModelForCausalLM.from_pretrained(folder)),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "weights"),
    [(convert, "float"), (convert, "q8"), (quantize, "q4")],
    ids=["convert", "convert-q8", "quantize"],
)
def test_convert_with_force(tmp_path: Path, write: Callable[..., Any], weights: str) -> None:
    second = tmp_path / "second"
    decoder(2).save_pretrained(second)
    check(
        tmp_path,
        lambda folder: decoder(1).save_pretrained(folder),
        lambda folder: write(second, folder, force=True, max_shard_size="20KB", weights=weights) and None,
        lambda folder: logits(minilm.AutoModelForCausalLM.from_pretrained(folder)),
    )


def embeddings(folder: Path) -> torch.Tensor:
    return SentenceEncoder(folder, device="cpu").encode(["tea in the garden"], convert_to_tensor=True)


@pytest.mark.slow
def test_sentence_encoders(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
    from tiny_sentence import build

    build(tmp_path / "a", lambda: Pooling(24, "cls"), Normalize)
    build(tmp_path / "b", lambda: Pooling(24, "mean"), lambda: Dense(24, 20), family="roberta")
    first = SentenceEncoder(tmp_path / "a" / "model", device="cpu")
    second = SentenceEncoder(tmp_path / "b" / "model", device="cpu")

    def answer(folder: Path) -> torch.Tensor:
        found = embeddings(folder)
        return torch.nn.functional.pad(found, (0, 24 - found.shape[1]))

    check(tmp_path, first.save_pretrained, second.save_pretrained, answer)
    theirs = SentenceTransformer(str(tmp_path / "top" / "m"), device="cpu")
    ours = embeddings(tmp_path / "top" / "m")
    assert torch.allclose(theirs.encode(["tea in the garden"], convert_to_tensor=True), ours, atol=1e-5)


def test_a_cross_encoder_in_place_of_a_sentence_encoder(tmp_path: Path) -> None:
    from tiny_models import save_model

    folder = tmp_path / "m"
    source = save_model(tmp_path / "pairs", "bert", "ForSequenceClassification")
    SentenceEncoder(save_model(tmp_path / "texts", "bert"), device="cpu").save_pretrained(folder)
    model = CrossEncoder(source, device="cpu")
    model.save_pretrained(folder)
    pairs = [("red tea", "a garden")]
    assert CrossEncoder(folder, device="cpu").predict(pairs) == pytest.approx(model.predict(pairs), abs=1e-6)


def test_the_folder_that_a_model_was_loaded_from(tmp_path: Path) -> None:
    decoder(1).save_pretrained(tmp_path, max_shard_size="20KB")
    model = minilm.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # which keeps the files mapped
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
        before = theirs(IDS).logits
    model.save_pretrained(tmp_path)
    again = minilm.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, before)


def test_a_tokenizer_in_place_of_another(tmp_path: Path) -> None:
    import tokenizer_folders as folders

    first = minilm.AutoTokenizer.from_pretrained(folders.gpt2(), chat_template="{{ messages }}")
    first.save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|endoftext|>"}')
    (tmp_path / "added_tokens.json").write_text('{"<extra>": 70000}')
    second = minilm.AutoTokenizer.from_pretrained(folders.wordpiece())
    second.save_pretrained(tmp_path)
    again = minilm.AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template is None
    assert again.special_tokens_map == second.special_tokens_map
    assert len(again) == len(second)
