"""`generate` of encoder-decoders gives transformers' tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_seq2seq import VOCABULARY, pair


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, 1, marks=pytest.mark.slow) for name in names]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 9, "eos_token_id": list(range(1, 15))},
    {"max_length": 12, "min_length": 6, "eos_token_id": list(range(3, 40))},
    {"max_length": 12, "min_new_tokens": 4, "eos_token_id": list(range(3, 40))},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 1, "max_length": 8},
    {"max_new_tokens": 10, "no_repeat_ngram_size": 2, "repetition_penalty": 1.4},
    {"max_new_tokens": 5, "decoder_start_token_id": 17},
]


def sources(pad: int, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(4, 7, dtype=torch.int64)
    mask[1, 4:] = mask[3, 2:] = 0
    return {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "part"),
    [("marian", 3), *slow("marian", "t5", "umt5", "t5-gated-untied", "bart", "mbart")],
)
def test_tokens_as_in_transformers(name: str, part: int, tmp_path: Path) -> None:
    """Greedy and sampled; rows end at different steps; defaults, forced tokens and penalties."""
    theirs, ours = pair(name, tmp_path)
    ended = set()
    for seed, options in enumerate(OPTIONS[::part]):
        given = sources(theirs.config.pad_token_id, seed)
        for more in ({}, {"do_sample": True}, {"do_sample": True, "top_k": 5, "num_return_sequences": 2}):
            torch.manual_seed(seed)
            expected = theirs.generate(**given, **options, **more)
            torch.manual_seed(seed)
            found = ours.generate(**given, **options, **more)
            assert torch.equal(found, expected), (options, more)
            ended |= set((found == theirs.config.pad_token_id).sum(1).tolist())
    assert len(ended) > (2 if part == 1 else 1)  # some rows end before others


FULL = {"return_dict_in_generate": True, "output_scores": True}
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 3, "eos_token_id": list(range(1, 30)), "max_new_tokens": 9},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 2.0, "eos_token_id": list(range(1, 15))},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -0.5, "eos_token_id": [3, 8, 20]},
    {"num_beams": 3, "forced_bos_token_id": 7, "forced_eos_token_id": 1, "max_length": 8},
    {"num_beams": 3, "max_new_tokens": 8, "min_new_tokens": 4, "eos_token_id": list(range(3, 40))},
    {"num_beams": 3, "max_new_tokens": 8, "no_repeat_ngram_size": 2, "repetition_penalty": 1.4},
    {"num_beams": 3, "max_new_tokens": 8, "bad_words_ids": [[5], [6, 7]], "encoder_no_repeat_ngram_size": 1},
    {"num_beams": 3, "max_new_tokens": 5, "do_sample": True, "top_k": 0, "num_return_sequences": 2},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "part"), [("mbart", 3), *slow("mbart", "t5", "umt5", "bart", "marian")])
def test_beams_as_in_transformers(name: str, part: int, tmp_path: Path) -> None:
    theirs, ours = pair(name, tmp_path)
    for seed, options in enumerate(BEAMS[::part]):
        given = sources(theirs.config.pad_token_id, seed)
        if "encoder_no_repeat_ngram_size" in options:  # transformers counts padding
            pad = theirs.config.pad_token_id  # which may be drawn as a token too
            real = (given["attention_mask"] > 0) & (given["input_ids"] != pad)
            given = {"input_ids": torch.where(real, given["input_ids"], 9)}
        torch.manual_seed(seed)
        expected = theirs.generate(**given, **options, **FULL)
        torch.manual_seed(seed)
        found = ours.generate(**given, **options, **FULL)
        # transformers fills with an end token if the padding token is 0
        width = found.beam_indices.shape[1]
        ended = found.beam_indices < 0
        assert torch.equal(found.beam_indices, expected.beam_indices), options
        new = expected.sequences[:, -width:].masked_fill(ended, theirs.config.pad_token_id)
        assert torch.equal(found.sequences[:, -width:], new), options
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-5)
        assert type(found).__name__ == type(expected).__name__
        torch.manual_seed(seed)
        assert torch.equal(ours.generate(**given, **options), found.sequences)


def test_options_of_the_source(tmp_path: Path) -> None:
    """The tokens of the source, without padding, for greedy decoding, samples and beams."""
    _, ours = pair("t5", tmp_path)
    given = sources(0, 2)
    own = [set(row[m > 0].tolist()) for row, m in zip(*given.values(), strict=True)]
    for more in (
        {},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
    ):
        options = {"max_new_tokens": 8, "eos_token_id": None, **more}
        found = ours.generate(**given, **options, encoder_no_repeat_ngram_size=1)
        each = len(found) // 4
        for row, text in enumerate(found[:, 1:].tolist()):
            assert not own[row // each] & set(text)
        found = ours.generate(**given, **options, encoder_repetition_penalty=1e6)
        for row, text in enumerate(found[:, 1:].tolist()):
            assert set(text) <= own[row // each]
    with pytest.raises(ValueError, match="encoder_no_repeat_ngram_size=2 needs the sources"):
        ours.generate(encoder_outputs=ours.encode(**given), encoder_no_repeat_ngram_size=2)


def test_other_ways_to_say_it(tmp_path: Path) -> None:
    """The mask from the padding, encoder_outputs, decoder_input_ids, scores, processors and criteria."""
    theirs, ours = pair("t5", tmp_path)
    given = sources(0, 3)
    options = {"max_new_tokens": 6, "eos_token_id": None}
    expected = theirs.generate(**given, **options, return_dict_in_generate=True, output_scores=True)
    found = ours.generate(given["input_ids"], **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    encoded = ours.encode(**given)
    again = ours.generate(encoder_outputs=encoded, attention_mask=given["attention_mask"], **options)
    assert torch.equal(again, expected.sequences)
    start = {"decoder_input_ids": torch.tensor([[0, 5, 9]] * 4)}
    assert torch.equal(
        ours.generate(**given, **start, **options), theirs.generate(**given, **start, **options)
    )

    def no_even(texts: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert len(texts) == 4
        return scores.index_fill(1, torch.arange(0, VOCABULARY, 2), -torch.inf)

    processors = transformers.LogitsProcessorList([no_even])
    theirs_odd = theirs.generate(**given, **options, logits_processor=processors)
    assert torch.equal(ours.generate(**given, **options, logits_processor=no_even), theirs_odd)
    assert (theirs_odd[:, 1:] % 2 == 1).all()
    allowed = {"prefix_allowed_tokens_fn": lambda row, text: [row + 3, 50]}
    assert torch.equal(
        ours.generate(**given, **options, **allowed), theirs.generate(**given, **options, **allowed)
    )


def test_the_source_is_read_once(tmp_path: Path) -> None:
    """The keys of the source are computed once per prompt and layer."""
    _, ours = pair("t5", tmp_path)
    calls = []
    ours.body.decoder.layers[0].cross.kv.register_forward_hook(lambda *_: calls.append(1))
    ours.generate(**sources(0, 1), max_new_tokens=7, eos_token_id=None)
    assert len(calls) == 1


def test_generation_options_of_a_checkpoint(tmp_path: Path) -> None:
    """decoder_start_token_id and forced tokens are read and written."""
    theirs, ours = pair("bart", tmp_path)
    theirs.generation_config.decoder_start_token_id = 11
    theirs.generation_config.forced_bos_token_id = 8
    theirs.generation_config.max_length = 9
    theirs.save_pretrained(tmp_path)
    ours = type(ours).from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "again")
    ours = type(ours).from_pretrained(tmp_path / "again")
    given = sources(1, 5)
    found = ours.generate(**given)
    assert torch.equal(found, theirs.generate(**given))
    assert found[:, :2].tolist() == [[11, 8]] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length=1 leaves no room"),
        ({"max_new_tokens": 60}, "60 positions, and the model has only 40"),
        ({"decoder_input_ids": torch.ones(3, 2).long()}, r"decoder_input_ids must be .*\[4, at least 1\]"),
        ({"num_beams": 4, "num_return_sequences": 5}, "num_return_sequences=5 is more than num_beams=4"),
        ({"num_beams": 4, "early_stopping": "x"}, "early_stopping must be.*'x'"),
        ({"num_beams": 4, "streamer": object()}, "a streamer needs num_beams=1"),
        ({"num_beam_groups": 2}, "does not support num_beam_groups=2 for encoder-decoders: transformers"),
        ({"stop_strings": ["a"]}, "does not support stop_strings"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 needs do_sample=True"),
    ],
)
def test_what_cannot_be_generated(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, ours = pair("bart", tmp_path)
    with pytest.raises(ValueError, match=message):
        ours.generate(**sources(1, 0), **options)
    with pytest.raises(TypeError, match="no argument 'beams'"):
        ours.generate(**sources(1, 0), beams=3)
