"""The paged KV cache against a list of tokens for each row."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from native_runs import require_extension
from strategies import small

import minilm
from minilm import ops
from minilm.cache import KVCache
from minilm.config import ModelConfig
from minilm.families import family_of


def spec(layers: int = 2) -> ModelConfig:
    """Two layers, one key/value head of size 4."""
    config = minilm.PretrainedConfig.from_dict(small("mistral", num_hidden_layers=layers))
    return family_of("mistral").config(config)


def cache_of(**options: Any) -> KVCache:
    return KVCache(spec(), dtype=torch.float32, device="cpu", **options)


class Cache(RuleBasedStateMachine):
    """Rows are begun, extended together or alone, cropped, forked, freed; each keeps its own tokens, in
    every layer."""

    rows = Bundle("rows")

    @initialize(page_size=st.integers(1, 5))
    def begin(self, page_size: int) -> None:
        self.cache = cache_of(page_size=page_size)
        self.tokens: dict[int, list[float]] = {}
        self.next = 1.0

    @rule(target=rows, count=st.integers(1, 2))
    def add(self, count: int) -> Any:
        new = self.cache.add_rows(count)
        assert not set(new) & set(self.tokens)
        self.tokens.update({row: [] for row in new})
        return multiple(*new)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, unique=True))
        counts = [data.draw(st.integers(0, 7)) for _ in chosen]
        fresh = all(not self.tokens[row] for row in chosen)
        step = self.cache.extend(chosen, counts)
        values = []
        for row, count in zip(chosen, counts, strict=True):
            new = [self.next + i for i in range(count)]
            self.next += count
            self.tokens[row] += new
            values += new
        assert step.fresh == fresh
        assert len(step.slots) == len(values) == len(set(step.slots.tolist()))
        assert step.context_lens.tolist() == [len(self.tokens[row]) for row in chosen]
        assert step.max_context == max(len(self.tokens[row]) for row in chosen)
        k = torch.tensor(values).view(-1, 1, 1).expand(-1, 1, 4)
        for layer in range(2):
            ops.append_kv(k + layer / 2, -k, self.cache.k_pages[layer], self.cache.v_pages[layer], step.slots)
        for place, row in enumerate(chosen):  # what attention will read by the table
            pages = step.block_table[place].long()
            read = self.cache.v_pages[1][pages].flatten(0, 1)[: len(self.tokens[row]), 0, 0]
            assert read.tolist() == [-value for value in self.tokens[row]]

    @rule(length=st.integers(-9, 12))
    def crop(self, length: int) -> None:
        self.cache.crop(length)
        if length:  # from the front, or, below 0, from the end
            self.tokens = {row: tokens[:length] for row, tokens in self.tokens.items()}

    @rule(row=rows, length=st.integers(0, 12))
    def crop_row(self, row: int, length: int) -> None:
        self.cache.crop_row(row, length)
        self.tokens[row] = self.tokens[row][:length]

    @rule(target=rows, row=rows)
    def fork(self, row: int) -> int:
        child = self.cache.fork(row)
        assert child not in self.tokens
        self.tokens[child] = list(self.tokens[row])
        return child

    @rule(row=consumes(rows))
    def free(self, row: int) -> None:
        self.cache.free_row(row)
        del self.tokens[row]

    @rule(tokens=st.integers(0, 20))
    def reserve(self, tokens: int) -> None:
        self.cache.reserve(tokens)
        assert len(self.cache._free) * self.cache.page_size >= tokens

    @invariant()
    def every_row_holds_its_tokens(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.rows == sorted(self.tokens)
        assert self.cache.lengths == {row: len(tokens) for row, tokens in self.tokens.items()}
        assert self.cache.get_seq_length() == max(map(len, self.tokens.values()), default=0)
        for row, tokens in self.tokens.items():
            for layer in range(2):
                assert self.cache.keys(layer, row)[:, 0, 3].tolist() == [
                    value + layer / 2 for value in tokens
                ]

    @invariant()
    def every_page_is_owned_or_free(self) -> None:
        """By one row, or by as many as the cache counts."""
        if not hasattr(self, "cache"):
            return
        owners = Counter(page for pages in self.cache._pages_of.values() for page in pages)
        everything = [*owners, *self.cache._free]
        assert sorted(everything) == list(range(len(self.cache.k_pages[0])))
        assert self.cache.used_pages == len(owners)
        assert {page: n - 1 for page, n in owners.items() if n > 1} == self.cache._shared
        for row, tokens in self.tokens.items():
            assert len(self.cache._pages_of[row]) == -(-len(tokens) // self.cache.page_size), (
                "pages kept without need"
            )


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_a_fork_shares_pages_until_it_writes() -> None:
    """Three rows of 10 tokens in pages of 4: the full pages stay shared, the third is copied once per writer
    but for the last."""
    cache = cache_of(page_size=4)
    (row,) = cache.add_rows(1)
    step = cache.extend([row], [10])
    k = torch.arange(10.0).view(-1, 1, 1).expand(-1, 1, 4)
    for layer in range(2):
        ops.append_kv(k, -k, cache.k_pages[layer], cache.v_pages[layer], step.slots)
    forks = [cache.fork(row), cache.fork(row)]
    assert cache.used_pages == 3
    step = cache.extend([row, *forks], [1, 1, 0])
    assert cache.used_pages == 5
    new = torch.tensor([20.0, 30.0]).view(-1, 1, 1).expand(-1, 1, 4)
    for layer in range(2):
        ops.append_kv(new, -new, cache.k_pages[layer], cache.v_pages[layer], step.slots)
    tokens = [cache.keys(1, each)[:, 0, 0].tolist() for each in (row, *forks)]
    first = list(map(float, range(10)))
    assert tokens == [[*first, 20.0], [*first, 30.0], first]
    cache.extend([forks[1]], [1])  # it alone holds the page now
    assert cache.used_pages == 5
    cache.free_row(row)
    assert cache.used_pages == 4
    for each in forks:
        cache.free_row(each)
    assert cache.used_pages == 0


def test_growing_keeps_what_is_there_and_adds_a_quarter() -> None:
    """Adding one token at a time copies the pages a few times, not at each new page."""
    cache = cache_of(rows=1, page_size=2)
    sizes = []
    for number in range(200):
        step = cache.extend([0], [1])
        ops.append_kv(
            torch.full((1, 1, 4), float(number)),
            torch.zeros(1, 1, 4),
            cache.k_pages[0],
            cache.v_pages[0],
            step.slots,
        )
        sizes.append(cache.nbytes())
    assert cache.keys(0, 0)[:, 0, 0].tolist() == [float(n) for n in range(200)]
    assert len(set(sizes)) < 25
    assert sizes[-1] < 1.3 * 2 * 200 * 4 * 4 * 2, "little more than what is needed"


def test_growing_copies_one_store_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the new values are made, the old keys are gone; what failed leaves a cache that can go on."""
    cache = cache_of(rows=1, page_size=2)
    cache.extend([0], [2])
    old_keys = weakref.ref(cache.k_pages[0])
    whole = KVCache._grow_store
    made = []

    def grown(self: KVCache, name: str, views: str, pages: int) -> None:
        made.append(old_keys() is not None)
        if len(made) == 2:
            raise MemoryError
        whole(self, name, views, pages)

    monkeypatch.setattr(KVCache, "_grow_store", grown)
    with pytest.raises(MemoryError):
        cache.extend([0], [9])
    assert made[:2] == [True, False]
    cache.extend([0], [9])
    assert cache.lengths[0] == 11
    assert {len(store[0]) for store in (cache.k_pages, cache.v_pages)} == {6}


def big_cache(**options: Any) -> KVCache:
    """Eight layers of 4 MiB each for keys, as many for values, all written to: layer n holds n + 1."""
    wide = replace(spec(8), num_heads=8, num_kv_heads=8, head_dim=64)
    cache = KVCache(wide, rows=1, dtype=torch.float32, device="cpu", page_size=32, **options)
    cache.extend([0], [2048])
    for layer in range(8):
        cache.k_pages[layer].fill_(layer + 1)
        cache.v_pages[layer].fill_(-layer - 1)
    return cache


def assert_full(cache: KVCache, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for layer in range(8):
        assert bool((keys[layer][:62] == layer + 1).all()), layer
        assert bool((values[layer][:62] == -layer - 1).all()), layer


GROW_AND_MEASURE = """
import mmap
from pathlib import Path
from test_cache import KVCache, assert_full, big_cache

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

seen = []
move = KVCache._move

def moved(cache, *arguments):
    move(cache, *arguments)
    seen.append(resident())

cache = big_cache()
KVCache._move = moved
before = resident()
cache.extend([0], [512])
assert_full(cache, cache.k_pages, cache.v_pages)
for pages in (*cache.k_pages, *cache.v_pages):
    pages[64:] = 0.5
print(len(seen), resident() - before, max(seen) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")
def test_growing_takes_no_memory_for_a_second_copy() -> None:
    """What has been copied is given back at once: the memory at any moment is at most that of the end.
    In a process of its own, since an allocator with memory to spare takes less from the system."""
    require_extension()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GROW_AND_MEASURE]
    for _ in range(3):  # a machine short of memory takes pages away meanwhile
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        moves, grown, most = map(int, done.stdout.split())
        if 10 << 20 < grown < 24 << 20:
            break
    assert moves == 16
    assert 10 << 20 < grown < 24 << 20, "a quarter of 64 MiB"
    assert most < grown + (6 << 20), "no store is there twice"


@pytest.mark.parametrize("holder", ["layer", "list", "store", "view", "array"])
def test_what_somebody_holds_of_a_cache_that_grows_stays(holder: str) -> None:
    cache = big_cache()
    held: dict[str, Any] = {
        "layer": lambda: (cache.k_pages[3], cache.v_pages[3]),
        "list": lambda: [pages[3] for pages in (cache.k_pages, cache.v_pages)],
        "store": lambda: [store[3] for store in cache.stores()],
        "view": lambda: (cache.k_pages[3].view(-1)[5:], cache.v_pages[3].view(-1)[5:]),
        "array": lambda: (cache.k_pages[3].numpy(), cache.v_pages[3].numpy()),
    }
    whole = (cache.k_pages, cache.v_pages, *cache.stores()) if holder in ("list", "store") else ()
    keys, values = held[holder]()
    cache.extend([0], [512])
    assert bool((keys == 4).all())
    assert bool((values == -4).all())
    if whole:
        assert_full(cache, [*whole[0]], [*whole[1]])
        assert_full(cache, [*whole[2]], [*whole[3]])
    assert_full(cache, cache.k_pages, cache.v_pages)


@pytest.mark.parametrize("at", [0, 3, 15])
def test_an_interrupt_while_growing_loses_nothing(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = big_cache()
    move, calls = KVCache._move, []

    def moved(self: KVCache, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        move(self, *arguments)

    monkeypatch.setattr(KVCache, "_move", moved)
    before = cache.state()
    with pytest.raises(KeyboardInterrupt):
        cache.extend([0], [512])
    assert cache.state() == before
    assert_full(cache, cache.k_pages, cache.v_pages)
    cache.crop_row(0, 2000)
    cache.extend([0], [3])
    assert cache.stores()[0].shape == cache.stores()[1].shape, "also where nothing has to grow"
    cache.extend([0], [512])
    assert_full(cache, cache.k_pages, cache.v_pages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_size(dtype: torch.dtype) -> None:
    cache = KVCache(spec(3), rows=2, dtype=dtype, device="cpu", page_size=4)
    assert cache.nbytes() == 0
    cache.extend([0, 1], [4, 1])
    assert (
        cache.nbytes() == 2 * 3 * 2 * 4 * 1 * 4 * dtype.itemsize
    )  # k and v, layers, pages, page size, heads, head size
    assert all(pages.dtype == dtype for pages in (*cache.k_pages, *cache.v_pages))


def test_rows_in_another_order() -> None:
    """Beam search and the like: the batch's rows change places, and their past with them."""
    cache = cache_of(rows=3, page_size=2)
    step = cache.extend([0, 1, 2], [1, 2, 3])
    k = torch.arange(6.0).view(-1, 1, 1).expand(-1, 1, 4)
    for layer in range(2):
        ops.append_kv(k, k, cache.k_pages[layer], cache.v_pages[layer], step.slots)
    cache.reorder([2, 0, 1])
    assert cache.rows == [2, 0, 1]
    assert [cache.lengths[row] for row in cache.rows] == [3, 1, 2]
    assert cache.keys(1, cache.rows[0])[:, 0, 0].tolist() == [3.0, 4.0, 5.0]


def test_unknown_row() -> None:
    with pytest.raises(KeyError):
        cache_of(rows=1).free_row(5)


def test_model_refuses_a_cache_of_another_batch() -> None:
    model = minilm.AutoModelForCausalLM.from_config(minilm.PretrainedConfig.from_dict(small("mistral")))
    with pytest.raises(ValueError, match=r"2 sequences.* 3|3.* 2"):
        model(torch.tensor([[5]] * 3), past_key_values=model.new_cache(2))
    with pytest.raises(ValueError, match="tuple"):
        model(torch.tensor([[5]]), past_key_values=((torch.zeros(1),),))
    encoder = minilm.AutoModel.from_config(minilm.PretrainedConfig.from_dict(small("bert")))
    with pytest.raises(ValueError, match="encoder"):
        encoder(torch.tensor([[5]]), past_key_values=model.new_cache(1))
