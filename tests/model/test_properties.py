"""What holds for every model, whatever its weights: padding, order, causality, caching and packing change
nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from close import assert_agree, assert_close, in_dtype_of
from hypothesis import given
from hypothesis import strategies as st
from pairs import arguments, model_of, rows
from strategies import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    Batch,
    Config,
    batches,
    configs,
    examples,
    is_dynamic,
    seeds,
    small,
)
from torch import Tensor

from minilm.cache import KVCache
from minilm.model.batch import pack

SAME = 1e-5
"""The same sums in another order: float32 values near one, a few hundred terms. Drawn models may be harder on
float32 than that, and are held to what it costs them (`assert_agree`)."""


def static(config: Config) -> bool:
    """Whether the model's frequencies are the same at every length: with `dynamic` rope, keys that are in
    the cache were turned for a shorter text, in every library."""
    return not is_dynamic(config)


@torch.no_grad()
def scores(model: Any, batch: Batch, call: dict[str, Tensor], **more: Any) -> Tensor:
    """Scores of the tokens, row after row, [T, V]."""
    return rows(batch, model(**call, **more).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    """Not a bit of it: side, amount, and whatever stands in the padded places."""

    @examples(25)
    @given(configs(family), batches(), seeds(), st.booleans(), st.integers(0, 5))
    def check(config: Config, batch: Batch, seed: int, left: bool, extra: int) -> None:
        model, other = model_of(config, seed), replace(batch, left=left, extra=extra)
        call = arguments(config, other)
        noise = torch.Generator().manual_seed(seed)
        for name in call.keys() - {"attention_mask"}:
            dim = (1,) * (call[name].dim() - 2)
            padding = (other.mask() == 0).view(*other.mask().shape, *dim)
            other_values = (
                torch.randint(config["vocab_size"], call[name].shape, generator=noise)
                if name == "input_ids"
                else torch.full_like(call[name], torch.nan if call[name].is_floating_point() else 0)
            )
            call[name] = torch.where(padding, other_values, call[name])
        expected = scores(model, batch, arguments(config, batch))
        assert torch.equal(scores(model, other, call), expected)
        assert expected.isfinite().all()

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_may_be_of_any_type(family: str) -> None:
    @examples(4)
    @given(configs(family), batches(), seeds())
    def check(config: Config, batch: Batch, seed: int) -> None:
        model, call = model_of(config, seed), arguments(config, batch)
        expected = scores(model, batch, call)
        for mask in (batch.mask().bool(), batch.mask().float(), batch.mask().int()):
            assert torch.equal(scores(model, batch, {**call, "attention_mask": mask}), expected)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_row_is_what_it_is_alone(family: str) -> None:
    """So the order of the rows and what else is in the batch do not matter."""

    @examples(25)
    @given(configs(family), batches(), seeds(), st.randoms(use_true_random=False))
    def check(config: Config, batch: Batch, seed: int, random: Any) -> None:
        model, call, mask = model_of(config, seed), arguments(config, batch), batch.mask().bool()
        with torch.no_grad():
            together = model(**call).logits
            order = list(range(len(batch.lengths)))
            random.shuffle(order)
            shuffled = model(**{name: value[order] for name, value in call.items()}).logits
            for place, row in enumerate(order):
                alone = {k: v[row : row + 1, mask[row]] for k, v in call.items() if k != "attention_mask"}

                def again(model: Any, alone: dict[str, Tensor] = alone) -> Tensor:
                    return model(**in_dtype_of(model, alone)).logits[0]

                expected, found = again(model), together[row, mask[row]]
                assert_agree(found, expected, model, again, atol=SAME, what=f"row {row}")
                found = shuffled[place, mask[row]]
                assert_agree(found, expected, model, again, atol=SAME, what=f"row {row} at {place}")

    check()


@pytest.mark.parametrize("family", DECODERS)
def test_later_tokens_change_nothing(family: str) -> None:
    """Causality. An encoder, for comparison, looks ahead."""

    @examples(20)
    @given(configs(family).filter(static), batches(), seeds(), st.integers(0, 10))
    def check(config: Config, batch: Batch, seed: int, at: int) -> None:
        batch = replace(batch, embedded=False)
        model, call = model_of(config, seed), arguments(config, batch)
        at = min(at, batch.columns - 1)
        changed = dict(call, input_ids=call["input_ids"].clone())
        changed["input_ids"][:, at:] = (changed["input_ids"][:, at:] + 1) % config["vocab_size"]
        with torch.no_grad():
            before, after = (model(**c).logits[:, :at] for c in (call, changed))
        assert_agree(after, before, model, lambda m: m(**in_dtype_of(m, call)).logits[:, :at], atol=SAME)

    check()


@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_looks_ahead(family: str) -> None:
    model = model_of(small(family), 0)
    with torch.no_grad():
        a, b = (model(torch.tensor([[5, 6, last]])).logits[0, 0] for last in (7, 8))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("family", DECODERS)
def test_cache_changes_nothing(family: str) -> None:
    """Any way to cut a batch into chunks of columns, with rows of any length and any page size, is one
    forward pass."""

    @examples(30)
    @given(
        configs(family).filter(static),
        batches(),
        seeds(),
        st.lists(st.integers(1, 4), max_size=12),
        st.integers(1, 5),
    )
    def check(config: Config, batch: Batch, seed: int, chunks: list[int], page_size: int) -> None:
        model, call = model_of(config, seed), arguments(config, batch)
        expected = scores(model, batch, call)
        cache = KVCache(
            model.spec, rows=len(batch.lengths), dtype=model.dtype, device=model.device, page_size=page_size
        )
        parts, start = [], 0
        for size in (*chunks, batch.columns):
            end = min(start + size, batch.columns)
            if end > start:
                part = {name: value[:, start:end] for name, value in call.items()}
                part["attention_mask"] = call["attention_mask"][:, :end]
                with torch.no_grad():
                    output = model(**part, past_key_values=cache, use_cache=True)
                assert output.past_key_values is cache
                parts.append(output.logits)
            start = end
        found = rows(batch, torch.cat(parts, dim=1))
        assert_agree(found, expected, model, lambda m: scores(m, batch, in_dtype_of(m, call)), atol=SAME)
        assert list(cache.lengths.values()) == list(batch.lengths)

    check()


@pytest.mark.parametrize("family", DECODERS)
def test_attention_maps_with_a_cache(family: str) -> None:
    """Of a chunk: the last rows of the whole map."""

    @examples(6)
    @given(configs(family).filter(static), seeds(), st.integers(1, 7))
    def check(config: Config, seed: int, split: int) -> None:
        batch = Batch(lengths=(8, 8), left=False, extra=0, seed=seed)
        model, ids = model_of(config, seed), batch.ids(config)
        with torch.no_grad():
            whole = model(ids, output_attentions=True).attentions
            first = model(ids[:, :split], use_cache=True)
            rest = model(
                ids[:, split:], past_key_values=first.past_key_values, output_attentions=True, use_cache=True
            ).attentions
        for layer, (a, b) in enumerate(zip(rest, whole, strict=True)):

            def again(model: Any, layer: int = layer) -> Tensor:
                return model(ids, output_attentions=True).attentions[layer][:, :, split:]

            assert_agree(a, b[:, :, split:], model, again, atol=SAME, what=f"layer {layer}")

    check()


@pytest.mark.parametrize("family", DECODERS)
def test_cache_is_cropped_forked_and_freed(family: str) -> None:
    """A cropped cache goes on as if the rest had never been read; two continuations of one past do not
    disturb each other."""

    @examples(12)
    @given(configs(family).filter(static), seeds(), st.integers(1, 6), st.integers(1, 5))
    def check(config: Config, seed: int, kept: int, page_size: int) -> None:
        model = model_of(config, seed)
        batch = Batch(lengths=(7, 4), left=False, extra=0, seed=seed)
        ids, V = batch.ids(config), config["vocab_size"]
        new = torch.randint(V, (3, 2), generator=torch.Generator().manual_seed(seed))

        def check_alone(found: Tensor, *tokens: Tensor, what: str) -> None:
            def again(model: Any) -> Tensor:
                return model(torch.cat(tokens)[None]).logits[0, -2:]

            assert_agree(found, again(model), model, again, atol=SAME, what=what)

        with torch.no_grad():
            cache = KVCache(model.spec, rows=2, dtype=model.dtype, device=model.device, page_size=page_size)
            model(ids, batch.mask(), past_key_values=cache, use_cache=True)
            cache.crop(kept)
            assert list(cache.lengths.values()) == [kept, min(kept, 4)]
            child = cache.fork(0)
            assert cache.rows == [0, 1, child]
            out = model(new, past_key_values=cache, use_cache=True).logits
            check_alone(out[0], ids[0, :kept], new[0], what="cropped")
            check_alone(out[1], ids[1, : min(kept, 4)], new[1], what="shorter row")
            check_alone(out[2], ids[0, :kept], new[2], what="fork")
            cache.free_row(1)
            out = model(new[:2], past_key_values=cache, use_cache=True).logits
            check_alone(out[0], ids[0, :kept], new[0], new[0], what="after a row was freed")
            check_alone(out[1], ids[0, :kept], new[2], new[1], what="fork, after it")

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_one_by_one(family: str) -> None:
    """The entry without padding: tokens end to end, and, for decoders, rows of a cache in any order."""

    @examples(15)
    @given(configs(family).filter(static), batches(), seeds(), st.integers(0, 10))
    def check(config: Config, batch: Batch, seed: int, at: int) -> None:
        model = model_of(config, seed)
        batch = replace(batch, left=False, embedded=False, with_types=False, with_positions=False)
        call = arguments(config, batch)

        def again(model: Any) -> Tensor:
            return rows(batch, model(**call, output_hidden_states=True).hidden_states[-1])

        with torch.no_grad():
            expected = again(model)
            packed = pack(*batch.mask().shape, batch.mask(), model.device)
            tokens = packed.pack(call["input_ids"])
            assert_agree(model.run_packed(tokens, packed), expected, model, again, atol=SAME)
            if family in ENCODERS:
                return
            # Every row is cut at the same place; the rows of the second call come in another order.
            cache = model.new_cache(len(batch.lengths))
            starts = [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]
            order = list(reversed(range(len(batch.lengths))))
            found: dict[int, list[Tensor]] = {row: [] for row in order}
            for part, chosen in ((slice(0, at), list(range(len(batch.lengths)))), (slice(at, None), order)):
                pieces = {row: torch.arange(batch.lengths[row])[part] for row in chosen}
                chosen = [row for row in chosen if len(pieces[row])]
                if not chosen:
                    continue
                lengths = [len(pieces[row]) for row in chosen]
                mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
                piece = pack(*mask.shape, mask, model.device)
                piece.positions = torch.cat([pieces[row] for row in chosen])
                where = torch.cat([pieces[row] + starts[row] for row in chosen])
                hidden = model.run_packed(tokens[where], piece, cache=cache, rows=chosen)
                for row, values in zip(chosen, torch.split(hidden, lengths), strict=True):
                    found[row].append(values)
            together = torch.cat([value for row in sorted(found) for value in found[row]])
        assert_agree(together, expected, model, again, atol=SAME, what="with a cache")

    check()


@pytest.mark.parametrize("family", DECODERS)
def test_logits_to_keep(family: str) -> None:
    @examples(6)
    @given(configs(family), batches(), seeds(), st.integers(1, 12))
    def check(config: Config, batch: Batch, seed: int, keep: int) -> None:
        model, call = model_of(config, seed), arguments(config, batch)
        with torch.no_grad():
            whole, part = model(**call).logits, model(**call, logits_to_keep=keep).logits
        assert_agree(
            part,
            whole[:, -keep:],
            model,
            lambda m: m(**in_dtype_of(m, call)).logits[:, -keep:],
            atol=SAME,
        )

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_batch_and_empty_rows(family: str) -> None:
    model = model_of(small(family), 1)
    ids = torch.tensor([[5, 6, 7], [8, 9, 2]])
    with torch.no_grad():
        for shape in ((0, 3), (2, 0), (0, 0)):
            assert model(torch.zeros(shape, dtype=torch.int64)).logits.shape == (*shape, 41)
        out = model(ids, torch.tensor([[0, 0, 0], [1, 1, 0]])).logits
        assert not out[0].any()
        assert_close(out[1, :2], model(ids[1:, :2]).logits[0], atol=SAME)
        assert not model(ids, torch.zeros_like(ids)).logits.any()
