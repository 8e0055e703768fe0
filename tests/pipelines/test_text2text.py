"""summarization, translation and text2text-generation: transformers' model, called as its pipelines did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_pieces import marian, mbart
from tiny_pieces import t5 as t5_folder
from tiny_seq2seq import with_tokenizer

import minilm

TEXTS = ["the cat sat on a mat.", "dogs ran over hills and far away", "trees"]
ENDS = list(range(3, 20))
"""So many end tokens that texts end at different places."""


def save(kind: str, folder: Path, **options: Any) -> Any:
    """A random model of transformers, saved next to its tokenizer's files."""
    with_tokenizer(kind, folder, **options)
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


TASKS = {
    "summarization": {"prefix": "the dogs: ", "max_length": 15, "min_length": 6, "num_beams": 3},
    "translation_en_to_fr": {"prefix": "cat ", "max_length": 12, "num_beams": 2, "early_stopping": True},
}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = transformers.T5Tokenizer.from_pretrained(t5_folder(folder))
    return folder, save("t5", folder, task_specific_params=TASKS), tokenizer


def written(model: Any, tokenizer: Any, text: str, **options: Any) -> list[list[int]]:
    return model.generate(**tokenizer(text, return_tensors="pt"), **options).tolist()


def texts_of(tokenizer: Any, rows: list[list[int]], key: str) -> list[dict[str, str]]:
    return [{f"{key}_text": tokenizer.decode(row, skip_special_tokens=True)} for row in rows]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("task", "key"), [("summarization", "summary"), ("translation_en_to_fr", "translation")]
)
def test_options_of_the_task(t5: Any, task: str, key: str) -> None:
    """The prefix, the lengths and the beams in task_specific_params; the call's come first."""
    folder, model, tokenizer = t5
    pipe = minilm.pipeline(task, model=str(folder))
    asked = dict(TASKS[task])
    prefix = asked.pop("prefix")
    for more in ({"num_beams": 1, "min_length": 3}, {"num_return_sequences": 2}):
        expected = [
            texts_of(tokenizer, written(model, tokenizer, prefix + text, **{**asked, **more}), key)
            for text in TEXTS
        ]
        assert pipe(TEXTS[0], **more) == expected[0]
        several = [row[0] for row in expected] if "num_return_sequences" not in more else expected
        assert pipe(TEXTS, **more) == several
        assert pipe(TEXTS, batch_size=3, **more) == several
        assert list(pipe(iter(TEXTS), **more)) == expected
    found = pipe(TEXTS[1], return_tensors=True)[0][f"{key}_token_ids"]
    assert found.tolist() == written(model, tokenizer, prefix + TEXTS[1], **asked)[0]


def test_defaults_of_the_pipelines(t5: Any) -> None:
    """Four beams and 256 new tokens; the prefix is of other tasks."""
    folder, model, tokenizer = t5
    pipe = minilm.pipeline(model=str(folder))
    assert pipe.task == "text2text-generation"
    rows = written(model, tokenizer, TEXTS[0], num_beams=4, max_new_tokens=256, eos_token_id=ENDS)
    assert pipe(TEXTS[0], eos_token_id=ENDS) == texts_of(tokenizer, rows, "generated")
    rows = written(model, tokenizer, TEXTS[0], num_beams=4, max_length=9)
    assert pipe(TEXTS[0], max_length=9) == texts_of(tokenizer, rows, "generated")
    ours = minilm.AutoModelForSeq2SeqLM.from_pretrained(folder)
    again = minilm.pipeline(model=ours, tokenizer=minilm.AutoTokenizer.from_pretrained(folder))
    assert again(TEXTS[0], max_length=9) == texts_of(tokenizer, rows, "generated")
    with pytest.warns(UserWarning, match="has 2 tokens, of which the first"):
        found = again(TEXTS[0], max_length=9, stop_sequence="the cat", return_tensors=True)
    stop = tokenizer("the cat").input_ids[0]
    rows = written(model, tokenizer, TEXTS[0], num_beams=4, max_length=9, eos_token_id=stop)
    assert found[0]["generated_token_ids"].tolist() == rows[0]


@pytest.mark.filterwarnings("ignore")
def test_languages_of_t5(t5: Any) -> None:
    """src_lang and tgt_lang name the task; those that the model does not have are an error."""
    folder, _, _ = t5
    pipe = minilm.pipeline("translation", model=str(folder))
    named = minilm.pipeline("translation_en_to_fr", model=str(folder))
    assert pipe(TEXTS[0], src_lang="en", tgt_lang="fr") == named(TEXTS[0])
    with pytest.raises(
        ValueError, match=r"src_lang='en' and tgt_lang='de' have no effect .* translation_en_to_fr"
    ):
        pipe(TEXTS[0], src_lang="en", tgt_lang="de")


@pytest.mark.filterwarnings("ignore")
def test_languages_of_mbart(tmp_path: Path) -> None:
    """The source's language is around the text, and the translation begins with its own."""
    folder = mbart(tmp_path, "MBart50Tokenizer")
    tokenizer = transformers.MBart50Tokenizer.from_pretrained(folder)
    model = save("mbart", folder)
    pipe = minilm.pipeline("translation", model=str(folder), src_lang="fr_XX", tgt_lang="ro_RO", max_length=9)
    tokenizer.src_lang = "fr_XX"
    forced = tokenizer.convert_tokens_to_ids("ro_RO")
    rows = written(model, tokenizer, "le chat", forced_bos_token_id=forced, max_length=9, num_beams=4)
    assert rows[0][1] == forced
    assert pipe("le chat") == texts_of(tokenizer, rows, "translation")
    named = minilm.pipeline("translation_fr_XX_to_ro_RO", model=str(folder), max_length=9)
    assert named("le chat") == pipe("le chat")
    with pytest.raises(
        ValueError, match="tgt_lang is 'xx_YY', and the tokenizer has only the languages ar_AR"
    ):
        pipe("le chat", tgt_lang="xx_YY")
    with pytest.raises(ValueError, match="needs src_lang= and tgt_lang=, and tgt_lang is missing"):
        minilm.pipeline("translation", model=str(folder))("le chat")


@pytest.mark.filterwarnings("ignore")
def test_long_texts_of_marian_are_translated_by_sentences(tmp_path: Path) -> None:
    """In parts that fit, each with the code of the language; a sentence that does not fit is an error."""
    folder = marian(tmp_path, model_max_length=15)
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    model = save("marian", folder)
    model.generation_config.update(bad_words_ids=[[tokenizer.pad_token_id]], num_beams=2, max_length=11)
    model.save_pretrained(folder)
    pipe = minilm.pipeline("translation", model=str(folder))
    assert type(pipe.model).__name__ == "MarianMTModel"
    assert minilm.pipeline(model=str(folder)).task == "translation"
    sentences = ["the cat sat on a mat.", "dogs ran over hills and far away!", "trees near water", "a cat"]
    code = ">>fr<< "
    for text in (sentences[0], code + sentences[0]):
        assert pipe(text) == texts_of(tokenizer, written(model, tokenizer, text), "translation")
    long = f"{code}{sentences[0]} {sentences[1]}\n{sentences[2]}\n\n{sentences[3]}"
    assert len(tokenizer(long).input_ids) > 15
    [found] = pipe(long)
    parts: list[str] = []
    for sentence in sentences:
        joined = f"{parts[-1]} {sentence}" if parts else code + sentence
        if not parts or len(tokenizer(joined).input_ids) > 15:
            parts.append(code + sentence)
        else:
            parts[-1] = joined
    assert len(parts) > 1
    expected = [texts_of(tokenizer, written(model, tokenizer, part), "t")[0]["t_text"] for part in parts]
    assert found["translation_text"].split() == " ".join(expected).split()
    with pytest.raises(ValueError, match=r"the text 'the the the.* tokens, and the model reads at most 15"):
        pipe("the " * 60)
    cut = tokenizer("the " * 60, truncation=True, return_tensors="pt")
    rows = model.generate(**cut).tolist()
    assert pipe("the " * 60, truncation=True) == texts_of(tokenizer, rows, "translation")


def test_texts_that_are_too_long(t5: Any, tmp_path: Path) -> None:
    """An error where positions end, a warning where only the tokenizer has a limit."""
    folder, model, tokenizer = t5
    long = "the cat " * 30
    pipe = minilm.pipeline("text2text-generation", model=str(folder), max_length=5)
    with pytest.warns(UserWarning, match="1 texts have more than 40 tokens"):
        found = pipe([long, "a"])
    rows = written(model, tokenizer, long, max_length=5, num_beams=4)
    assert found[0] == texts_of(tokenizer, rows, "generated")[0]
    save("bart", t5_folder(tmp_path, model_max_length=None), max_position_embeddings=33)
    pipe = minilm.pipeline("summarization", model=str(tmp_path), max_length=5)
    with pytest.raises(
        ValueError, match="has 61 tokens, and the model reads at most 33: truncation=True cuts it"
    ):
        pipe(long)
    assert set(pipe(long, truncation=True)[0]) == {"summary_text"}


def test_warnings_about_lengths(t5: Any) -> None:
    pipe = minilm.pipeline("summarization", model=str(t5[0]))
    with pytest.warns(UserWarning, match="max_length=30 is more than the 6 tokens of the text"):
        pipe("the cat", max_length=30)
    with pytest.warns(UserWarning, match="min_length=9 is more than max_length=5"):
        pipe("the cat", max_length=5, min_length=9)
    pipe = minilm.pipeline("translation_en_to_fr", model=str(t5[0]))
    with pytest.warns(UserWarning, match="the text has 4 tokens, and its translation at most max_length=4"):
        pipe("the cat", max_length=4)


def test_what_is_refused(t5: Any) -> None:
    folder = str(t5[0])
    with pytest.raises(ValueError, match=r"unknown task 'translate'.* translation_xx_to_yy"):
        minilm.pipeline("translate", model=folder)
    with pytest.raises(TypeError, match="no argument 'src_lang'"):
        minilm.pipeline("summarization", model=folder, src_lang="en")("a")
    with pytest.raises(ValueError, match="return_text and return_tensors exclude"):
        minilm.pipeline("summarization", model=folder)("a", return_text=True, return_tensors=True)
    with pytest.raises(TypeError, match="summarization takes texts, and got int"):
        minilm.pipeline("summarization", model=folder)([3])
    with pytest.raises(ValueError, match="summarization needs a model="):
        minilm.pipeline("summarization")
