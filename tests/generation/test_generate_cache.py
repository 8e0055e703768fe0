"""The cache of `generate`: what it holds when others go on with it, and after an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_decoders import batch, decoder, prompts

from minilm.cache import KVCache

FAMILIES = ("gpt2", "llama", "qwen3")


def written(model: Any, inputs: Any, **options: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=6,
        eos_token_id=None,
        pad_token_id=2,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [0, -1, -4, -8, 9, 3, 40])
def test_a_padded_batch_goes_on_in_forward_as_in_transformers(family: str, cut: int) -> None:
    """After a crop too; columns are those of the result."""
    d = decoder(family)
    inputs = batch(prompts([7, 4, 5]))
    ours, theirs = written(d.ours, inputs), written(d.theirs, inputs)
    assert torch.equal(ours.sequences, theirs.sequences)
    mask = torch.cat((inputs["attention_mask"], torch.ones(3, 6, dtype=torch.int64)), 1)
    for output in (ours, theirs):
        output.past_key_values.crop(cut)
    past = theirs.past_key_values.get_seq_length()
    assert ours.past_key_values.get_seq_length() == past
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    with torch.no_grad():
        expected = d.theirs(
            theirs.sequences[:, past:],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=theirs.past_key_values,
        ).logits
        found = d.ours(
            ours.sequences[:, past:], attention_mask=mask, past_key_values=ours.past_key_values
        ).logits
    real = mask[:, past:].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=2e-4)


def test_forward_and_generate_take_turns() -> None:
    model, inputs = decoder("llama").ours, batch(prompts([6, 3]))
    whole = written(model, inputs)
    with torch.no_grad():
        cache = model(
            inputs["input_ids"][:, :4], inputs["attention_mask"][:, :4], use_cache=True
        ).past_key_values
    found = written(model, inputs, past_key_values=cache)
    assert torch.equal(found.sequences, whole.sequences)
    assert found.past_key_values.get_seq_length() == 11
    more = torch.cat((found.sequences, torch.tensor([[7, 8], [9, 5]])), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 8, dtype=torch.int64)), 1)
    with_cache = written(
        model, {"input_ids": more, "attention_mask": mask}, past_key_values=found.past_key_values
    )
    without = written(model, {"input_ids": more, "attention_mask": mask})
    assert torch.equal(with_cache.sequences, without.sequences)


def test_padding_between_tokens_is_refused() -> None:
    """Where one pass counts it in the positions, generate does not."""
    model, ids = decoder("llama").ours, torch.tensor([[5, 6, 7, 8]])
    mask = torch.tensor([[1, 0, 1, 1]])
    with torch.no_grad():
        cache = model(ids[:, :3], mask[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="padding between its tokens"):
        written(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("place", ["run_packed", "step", "fork"])
def test_an_error_leaves_the_cache_as_it_was(place: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = decoder("qwen3").ours, batch(prompts([6, 3]))
    way: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "seed": 4, "prefill_chunk_size": 1}

    def cache() -> Any:
        with torch.no_grad():
            return model(
                inputs["input_ids"][:, :4], inputs["attention_mask"][:, :4], use_cache=True
            ).past_key_values

    def go_on(past: Any) -> Any:
        return model.generate(**inputs, max_new_tokens=5, past_key_values=past, **way)

    expected, past = go_on(cache()), cache()
    before = past.state()
    owner: Any = KVCache if place == "fork" else model
    usual, calls = getattr(owner, place), 0

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return usual(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, fail)
        with pytest.raises(KeyboardInterrupt):
            go_on(past)
    assert list(past.state()) == list(before)
    assert past.get_seq_length() == 4
    assert len(past._free) + sum(map(len, past._pages_of.values())) == past._pages
    assert torch.equal(go_on(past), expected)
