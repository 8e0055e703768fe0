"""llama.cpp through llama-cpp-python, in four formats made from the shipped Q4_1 file by its own
quantiser."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Engine, Unavailable


class LlamaCpp(Engine):
    """One context; logits of the last token of each sequence; greedy choice by NumPy's argmax."""

    package = "llama-cpp-python"
    decoder = True
    file_type = 0
    """`llama_ftype` of the file; -1: as it is shipped."""
    suffix = "f32"

    def path(self) -> Path:
        """The file that is run."""
        if self.assets.gguf is None:
            raise Unavailable("runs GGUF files, and there is none of this model")
        return self.assets.gguf if self.file_type < 0 else self.assets.cache / f"{self.suffix}.gguf"

    def prepare(self) -> None:
        """Requantise once: to float32 from the shipped file, and from float32 to the others."""
        target = self.path()
        if target.is_file():
            return
        import llama_cpp

        first = self.assets.cache / "f32.gguf"
        for source, made, kind in ((self.assets.gguf, first, 0), (first, target, self.file_type)):
            if made.is_file():
                continue
            options = llama_cpp.llama_model_quantize_default_params()
            options.ftype, options.allow_requantize, options.nthread = kind, True, self.threads
            options.pure = False
            partial = made.with_suffix(".partial")
            failed = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), options)
            if failed:
                raise Unavailable(f"llama_model_quantize failed with status {failed} for {made.name}")
            partial.replace(made)

    def load(self) -> None:
        """Load the model; contexts are created for the requested number of sequences."""
        import llama_cpp

        self.lib: Any = llama_cpp
        llama_cpp.llama_backend_init()
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(silent, None)
        self._silent = silent  # kept alive
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(self.path()).encode(), options)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self._contexts: dict[int, Any] = {}

    def _context(self, sequences: int) -> Any:
        if sequences not in self._contexts:
            options = self.lib.llama_context_default_params()
            options.n_ctx = 2048 * sequences
            options.n_batch = options.n_ubatch = 512
            options.n_seq_max = sequences
            options.n_threads = options.n_threads_batch = self.threads
            self._contexts[sequences] = self.lib.llama_init_from_model(self.model, options)
        context = self._contexts[sequences]
        self.lib.llama_memory_clear(self.lib.llama_get_memory(context), True)
        return context

    def _decode(self, context: Any, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, wants logits) for each token of one call."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, wanted
        status = self.lib.llama_decode(context, batch)
        self.lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode ended with status {status}")

    def _best(self, context: Any, index: int) -> int:
        import numpy as np

        logits = self.lib.llama_get_logits_ith(context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, list[int]]:
        context = self._context(len(prompts))
        first = []
        for sequence, prompt in enumerate(prompts):
            for at in range(0, len(prompt), 512):
                part = prompt[at : at + 512]
                last = at + len(part) == len(prompt)
                ends = [(t, at + i, sequence, last and i == len(part) - 1) for i, t in enumerate(part)]
                self._decode(context, ends)
            first.append(self._best(context, -1))
        return context, first

    def _run(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[list[list[int]], float]:
        context, first = self._read(prompts)
        written = [[token] for token in first]
        begin = time.perf_counter()
        for step in range(new - 1):
            tokens = [
                (w[-1], len(p) + step, s, True) for s, (p, w) in enumerate(zip(prompts, written, strict=True))
            ]
            self._decode(context, tokens)
            for s, w in enumerate(written):
                w.append(self._best(context, s))
        return written, time.perf_counter() - begin

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Greedy; one call per step for all sequences."""
        return self._run(prompts, new)[0]

    def decode_seconds(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """The steps after the first token."""
        return self._run(prompts, 1 + new)[1]

    def note(self) -> str:
        """Which file."""
        return (
            "the file as shipped" if self.file_type < 0 else "requantised from the shipped file by llama.cpp"
        )


class F32(LlamaCpp):
    """float32 weights."""


class F16(LlamaCpp):
    """float16 weights."""

    precision = "fp16"
    bytes_a_weight = 2.0
    file_type, suffix = 1, "f16"


class Q8(LlamaCpp):
    """8-bit blocks of 32 with one fp16 scale."""

    precision = "int8"
    bytes_a_weight = 34 / 32
    file_type, suffix = 7, "q8_0"


class Q4(LlamaCpp):
    """4-bit blocks of 32 with scale and minimum, as shipped."""

    precision = "q4"
    bytes_a_weight = 20 / 32
    file_type = -1
