"""The interface of a peer. No heavy import here: imports count in cold starts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Skipped:
    """A peer that cannot run here, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class OpPeer:
    """Another way to compute an op of `minilm.ops`.

    `prepare` converts the op's arguments to those of `call` (in the peer's best layout, outside the timing);
    `result` converts the output back to the op's, for the check."""

    name: str
    call: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = lambda values: values
    result: Callable[[Any], Any] = lambda values: values
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    rounds: bool = False
    """Whether it rounds its activations to 8 bits, as products with quantised weights may; the check then
    allows for that error."""


@dataclass(frozen=True)
class Assets:
    """The folders of a model, and of converted files."""

    model: str
    """Name in `minilm.benchmarks.shapes`."""
    folder: Path
    """In the layout of transformers: config.json, model.safetensors, tokenizer files."""
    cache: Path
    gguf: Path | None = None


class Unavailable(RuntimeError):
    """Raised if this engine cannot run this model here; the message says why."""


class Engine:
    """A program that runs whole models. One instance lives in one process and runs one model.

    `encoder` and `decoder` say what it can run. All token ids are lists of ints; nothing is padded by the
    caller."""

    package: str | None = None
    """Distribution on PyPI that must be installed."""
    precision: str = "fp32"
    """Precision of the weights: fp32, fp16, bf16, int8 or q4."""
    bytes_a_weight: float = 4.0
    copies: float = 1.5
    """How many copies of the weights are in memory after loading, including buffers."""
    encoder = False
    decoder = False
    devices: tuple[str, ...] = ("cpu",)
    only_real_models = True
    """Whether models with random weights are left out (their conversion would add no information)."""

    def __init__(self, assets: Assets, threads: int, device: str = "cpu") -> None:
        self.assets = assets
        self.threads = threads
        self.device = device

    @classmethod
    def unavailable(cls, device: str = "cpu") -> str | None:
        """None, or why this engine cannot run here. Imports nothing."""
        if cls.package is not None:
            try:
                importlib.metadata.version(cls.package)
            except importlib.metadata.PackageNotFoundError:
                return f"{cls.package} is not installed (make bench-peers)"
        if device not in cls.devices:
            return f"is measured on {' and '.join(cls.devices)} only"
        return None

    def prepare(self) -> None:
        """Convert the model once, if necessary, into the cache. Not timed."""

    def load(self) -> None:
        """Load the model, ready to run."""
        raise NotImplementedError

    # Encoders
    def embed_ids(self, batch: Sequence[Sequence[int]]) -> Any:
        """Sentence embeddings, mean-pooled and normalised, float [B, C] (NumPy or torch)."""
        raise Unavailable(f"{type(self).__name__} runs no encoder")

    def embed_texts(self, texts: Sequence[str]) -> Any:
        """Sentence embeddings [len(texts), C] in the order of the texts, tokenisation included.

        By default, as users of the engine would write it: texts sorted by their number of tokens, in batches
        of 32, each padded to its longest."""
        import numpy as np

        ids = self.tokenize(texts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
        rows: list[Any] = [None] * len(ids)
        for at in range(0, len(order), 32):
            chosen = order[at : at + 32]
            for i, row in zip(chosen, self.embed_ids([ids[i] for i in chosen]), strict=True):
                rows[i] = row
        return np.stack([np.asarray(row) for row in rows])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut at the model's 256 tokens."""
        from tokenizers import Tokenizer

        if not hasattr(self, "_tokenizer"):
            self._tokenizer = Tokenizer.from_file(str(self.assets.folder / "tokenizer.json"))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(max_length=256)
        return [e.ids for e in self._tokenizer.encode_batch(list(texts))]

    # Decoders
    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """`new` greedy tokens after each prompt (all of one length), never stopping early."""
        raise Unavailable(f"{type(self).__name__} runs no decoder")

    def prefill_seconds(self, prompt: Sequence[int]) -> float:
        """Time to the first token after `prompt`."""
        begin = time.perf_counter()
        self.generate([prompt], 1)
        return time.perf_counter() - begin

    def decode_seconds(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """Time of `new` steps after the first token. By default the time of 1 + new tokens minus that of 1
        token, for programs that do not show their steps."""
        begin = time.perf_counter()
        self.generate(prompts, 1)
        middle = time.perf_counter()
        self.generate(prompts, 1 + new)
        return time.perf_counter() - middle - (middle - begin)

    def note(self) -> str:
        """Information for readers on how this engine was run."""
        return ""


def require_package(name: str) -> str | None:
    """None if the module `name` can be imported, otherwise a message."""
    return None if importlib.util.find_spec(name) else f"{name} is not installed"
