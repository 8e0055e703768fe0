"""`SamplingParams`: what is out of range is named."""

from __future__ import annotations

import math
from typing import Any

import pytest

from minilm import SamplingParams


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n must be.*0"),
        ({"n": 2, "temperature": 0}, "n must be 1"),
        ({"temperature": -0.5}, "temperature must be.*-0.5"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0}, "top_p must be above 0.*0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k must be.*-2"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty must be between -2 and 2, and is 3"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens must be.*1, and is 0"),
        ({"min_tokens": 17}, "min_tokens=17 is more than max_tokens=16"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop": ["a", ""]}, "stop must be"),
        ({"stop": "a", "detokenize": False}, "detokenize=False"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"logprobs": -2}, "logprobs"),
        ({"seed": 1.5}, "seed must be"),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingParams(**options)
