"""Texts that have ended stay in the cache, so that a prompt that begins like one of them is read from where
the two differ: the next question of a conversation, or another question after the same instructions.

vLLM's `enable_prefix_caching` (Kwon et al. 2023, arXiv:2309.06180, section 4.4) does this for whole pages, by
their hashes; here for whole texts, whose pages a copy-on-write fork shares. The keys and values that a prompt
takes over were computed in other batches than its own would be, so logits may differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..cache import KVCache


class Prefixes:
    """The kept texts, of at most `most` tokens together; the one that was used least recently goes first."""

    def __init__(self, cache: KVCache, most: int) -> None:
        self.cache = cache
        self.most = most
        self._texts: dict[int, list[int]] = {}
        """Row of the cache -> its tokens, the least recently used first."""

    def begin(self, prompt: list[int]) -> tuple[int, int]:
        """A new row for a prompt, and how many of its tokens the row holds already; never all of them, since
        the last one's logits are needed."""
        best, most = -1, 0
        for row, text in self._texts.items():
            count = common(text, prompt)
            if count >= max(most, 1):
                best, most = row, count
        most = min(most, len(prompt) - 1)
        if most < 1:
            (row,) = self.cache.add_rows(1)
            return row, 0
        self._texts[best] = self._texts.pop(best)
        row = self.cache.fork(best)
        self.cache.crop_row(row, most)
        return row, most

    def keep(self, row: int, tokens: Sequence[int]) -> None:
        """Take over the row of a text that has ended; `tokens`: all that the row may hold."""
        text = list(tokens[: self.cache.lengths[row]])
        for other, old in list(self._texts.items()):
            if common(old, text) == len(old):  # all of it is in the new one
                self._drop(other)
        self._texts[row] = text
        held = sum(map(len, self._texts.values()))
        for other, old in list(self._texts.items()):
            if held <= self.most:
                break
            held -= len(old)
            self._drop(other)

    def clear(self) -> None:
        """Drop all texts."""
        for row in list(self._texts):
            self._drop(row)

    def _drop(self, row: int) -> None:
        del self._texts[row]
        self.cache.free_row(row)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
