"""text-generation against transformers.pipeline: greedy and drawn texts, chats, the options of results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from same import assert_same
from tiny_models import save_decoder

from minilm import AutoModelForCausalLM
from minilm.pipelines import pipeline

FAMILIES = ("gpt2", "llama")
PROMPTS = ["John Smith lives in", "Anna", "The green tea house: who is the man in the red book?"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where does Anna live?"}]
PREFILLED = [*CHAT, {"role": "assistant", "content": "Anna lives"}]
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    made = {}
    for family in FAMILIES:
        folder = save_decoder(tmp_path_factory.mktemp(family), family)
        theirs = transformers.pipeline("text-generation", model=str(folder), device=-1)
        made[family] = pipeline("text-generation", model=folder, device="cpu"), theirs
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts(pairs: Any, family: str) -> None:
    ours, theirs = pairs[family]
    expected = theirs(PROMPTS, **GREEDY)
    assert len({answer[0]["generated_text"] for answer in expected}) == 3
    assert_same(ours(PROMPTS, **GREEDY), expected)
    assert_same(ours(PROMPTS[0], **GREEDY), theirs(PROMPTS[0], **GREEDY))
    for options in (
        {"return_full_text": False},
        {"return_tensors": True},
        {"prefix": "Mary: "},
        {"skip_special_tokens": False},
        {"clean_up_tokenization_spaces": False},
        {"add_special_tokens": False},
        {"truncation": True, "tokenizer_encode_kwargs": {"max_length": 3}},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ):
        assert_same(ours(PROMPTS[2], **GREEDY, **options), theirs(PROMPTS[2], **GREEDY, **options))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_texts_are_those_of_transformers(pairs: Any, family: str) -> None:
    """After the same torch.manual_seed; do_sample and the temperature are the pipeline's defaults."""
    ours, theirs = pairs[family]
    for options in (
        {"max_new_tokens": 10},
        {"max_new_tokens": 8, "num_return_sequences": 3},
        {"max_new_tokens": 8, "top_p": 0.9, "top_k": 20, "temperature": 1.3},
    ):
        for prompt in (*PROMPTS, CHAT):
            torch.manual_seed(11)
            expected = theirs(prompt, **options)
            torch.manual_seed(11)
            assert_same(ours(prompt, **options), expected)
    answers = ours(PROMPTS[0], max_new_tokens=8, num_return_sequences=9)
    assert len({answer["generated_text"] for answer in answers}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_beams(pairs: Any, family: str) -> None:
    ours, theirs = pairs[family]
    for options in (
        {"num_beams": 4, "do_sample": False, "max_new_tokens": 9},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 9},
        {"num_beams": 3, "max_new_tokens": 6, "top_k": 0},
    ):
        for prompt in (*PROMPTS, CHAT):
            torch.manual_seed(11)
            expected = theirs(prompt, **options)
            torch.manual_seed(11)
            assert_same(ours(prompt, **options), expected)
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 9, "early_stopping": True}
    expected = [ours(prompt, **options) for prompt in PROMPTS]
    assert_same(ours(PROMPTS, batch_size=2, **options), expected)
    with pytest.raises(ValueError, match=r"num_return_sequences=5 is more than num_beams=3"):
        ours(PROMPTS[0], num_return_sequences=5, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_chats(pairs: Any, family: str) -> None:
    ours, theirs = pairs[family]
    for chat in (CHAT, PREFILLED):
        for options in ({}, {"return_full_text": False}):
            assert_same(ours(chat, **GREEDY, **options), theirs(chat, **GREEDY, **options))
    assert_same(ours([CHAT, PREFILLED], **GREEDY), theirs([CHAT, PREFILLED], **GREEDY))
    answered = ours(CHAT, **GREEDY)[0]["generated_text"]
    assert [message["role"] for message in answered] == ["system", "user", "assistant"]
    assert answered[:2] == CHAT
    new = ours(PREFILLED, continue_final_message=False, **GREEDY)
    assert_same(new, theirs(PREFILLED, continue_final_message=False, **GREEDY))
    assert len(new[0]["generated_text"]) == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_give_what_each_prompt_gets_alone(pairs: Any, family: str, batch_size: int) -> None:
    ours, _ = pairs[family]
    for options in (GREEDY, {**GREEDY, "return_tensors": True}, {**GREEDY, "stop_sequence": "e"}):
        expected = [ours(prompt, **options) for prompt in (*PROMPTS, CHAT)]
        assert_same(ours([*PROMPTS, CHAT], batch_size=batch_size, **options), expected)
    streamed = ours((prompt for prompt in PROMPTS), batch_size=batch_size, **GREEDY)
    assert isinstance(streamed, Iterator)
    assert_same(list(streamed), ours(PROMPTS, **GREEDY))


def test_texts_end(pairs: Any) -> None:
    ours, theirs = pairs["llama"]
    long = {"do_sample": False, "max_new_tokens": 40}
    text = ours(PROMPTS[0], return_full_text=False, **long)[0]["generated_text"]
    stop = text[7:9]
    assert_same(ours(PROMPTS[0], stop_sequence=stop, **long), theirs(PROMPTS[0], stop_sequence=stop, **long))
    stopped = ours(PROMPTS[0], stop_strings=[stop], return_full_text=False, **long)[0]["generated_text"]
    assert len(stopped) < len(text)
    assert text.startswith(stopped)
    assert stop in stopped


def test_defaults_of_the_checkpoint_come_first(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "greedy", "gpt2", do_sample=False, max_new_tokens=5)
    ours = pipeline("text-generation", model=folder, device="cpu")
    theirs = transformers.pipeline("text-generation", model=str(folder), device=-1)
    expected = theirs(PROMPTS)
    assert_same(ours(PROMPTS), expected)
    prompt = ours.tokenizer(PROMPTS[0])["input_ids"]
    assert len(ours(PROMPTS[0], return_tensors=True)[0]["generated_token_ids"]) <= len(prompt) + 5
    longer = save_decoder(tmp_path / "longer", "gpt2", do_sample=False, max_length=17)
    ours = pipeline("text-generation", model=longer, device="cpu")
    theirs = transformers.pipeline("text-generation", model=str(longer), device=-1)
    assert_same(ours(PROMPTS[:2]), theirs(PROMPTS[:2]))


TASKS: list[dict[str, Any]] = [
    {"do_sample": False, "max_length": 14, "max_new_tokens": 9},
    {"do_sample": False, "max_new_tokens": 5},
    {"do_sample": True, "top_k": 3, "max_new_tokens": 6, "temperature": 2.0},
    {"do_sample": False, "max_new_tokens": 5, "prefix": "Mary: "},
    {"do_sample": False, "max_new_tokens": 5, "repetition_penalty": 1.7, "num_answers": 3},
    {"do_sample": False, "max_new_tokens": 5, "num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
]


@pytest.mark.parametrize("of_task", TASKS, ids=str)
def test_the_parameters_of_the_task_in_config_json(of_task: dict[str, Any], tmp_path: Path) -> None:
    folder = save_decoder(tmp_path, "gpt2")
    file = folder / "config.json"
    tasks = {"text-generation": of_task, "summarization": {"max_new_tokens": 1}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_specific_params": tasks}))
    theirs = transformers.pipeline("text-generation", model=str(folder), device=-1)
    ours = pipeline("text-generation", model=folder, device="cpu")
    for options in ({}, {"max_new_tokens": 3}, {"do_sample": True, "temperature": 0.9}, {"prefix": "Anna: "}):
        torch.manual_seed(1)
        expected = theirs(PROMPTS[0], **options)
        torch.manual_seed(1)
        assert_same(ours(PROMPTS[0], **options), expected)


@pytest.mark.parametrize(
    "tasks", [None, {}, [], {"text-generation": None}, {"translation": {"num_beams": 4}}]
)
def test_no_parameters_of_the_task(tasks: Any, pairs: Any, tmp_path: Path) -> None:
    folder = save_decoder(tmp_path, "gpt2")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_specific_params": tasks}))
    ours = pipeline("text-generation", model=folder, device="cpu")
    assert_same(ours(PROMPTS, **GREEDY), pairs["gpt2"][1](PROMPTS, **GREEDY))


def test_a_default_length_is_cut_to_the_window(pairs: Any) -> None:
    ours, _ = pairs["gpt2"]
    prompt = "tea " * 20
    ids = ours(prompt, return_tensors=True, do_sample=False)[0]["generated_token_ids"]
    assert len(ids) <= 96
    with pytest.raises(ValueError, match="96"):
        ours(prompt, do_sample=False, max_new_tokens=90)
    hole = ours(
        "tea " * 60 + "Anna",
        handle_long_generation="hole",
        do_sample=False,
        max_new_tokens=10,
        return_tensors=True,
    )
    assert len(hole[0]["generated_token_ids"]) <= 96


def test_an_empty_prompt(pairs: Any) -> None:
    ours, theirs = pairs["gpt2"]
    assert_same(ours("", **GREEDY), theirs("", **GREEDY))


def test_loaded_model_and_streamer(pairs: Any) -> None:
    ours, _ = pairs["gpt2"]
    model = AutoModelForCausalLM.from_pretrained(ours.model.name_or_path)
    write = pipeline("text-generation", model=model, tokenizer=ours.tokenizer, do_sample=False)
    assert_same(write(PROMPTS[1], max_new_tokens=12), ours(PROMPTS[1], **GREEDY))
    seen: list[int] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            seen.append(-1)

    ids = write(PROMPTS[1], max_new_tokens=12, streamer=Streamer(), return_tensors=True)[0][
        "generated_token_ids"
    ]
    assert seen == [*ids, -1]


def test_bad_input(pairs: Any) -> None:
    ours, _ = pairs["gpt2"]
    with pytest.raises(TypeError, match="takes texts, and got int: 3"):
        ours([3])
    with pytest.raises(TypeError, match="generate has no argument 'temprature'"):
        ours("Anna", temprature=2)
    with pytest.raises(ValueError, match="return_full_text cannot be combined"):
        ours("Anna", return_full_text=True, return_tensors=True)
    with pytest.raises(ValueError, match="handle_long_generation must be None or 'hole', and is 'cut'"):
        ours("Anna", handle_long_generation="cut")
    with pytest.raises(ValueError, match="max_new_tokens=96 leaves no room for a prompt in the window of 96"):
        ours("Anna", handle_long_generation="hole", max_new_tokens=96)
    with pytest.raises(TypeError, match="takes texts, and got dict"):
        ours([{"role": "user"}])
