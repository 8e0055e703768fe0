"""ONNX Runtime GenAI, with the model made by its builder from the transformers folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Engine, Unavailable


class GenAI(Engine):
    """float32."""

    package = "onnxruntime-genai"
    decoder = True
    built = "fp32"

    def path(self) -> Path:
        """The built model."""
        return self.assets.cache / f"genai-{self.built}"

    def prepare(self) -> None:
        """Build once, in a separate process."""
        if (self.path() / "genai_config.json").is_file():
            return
        partial = self.path().with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(self.assets.folder)]
        command += [
            "-o",
            str(partial),
            "-p",
            self.built,
            "-e",
            "cpu",
            "-c",
            str(self.assets.cache / "genai-cache"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise Unavailable(f"the builder of onnxruntime-genai failed: {lines[-1][:200]}")
        partial.replace(self.path())

    def load(self) -> None:
        """Load the model with the threads asked for."""
        import onnxruntime_genai

        self.lib: Any = onnxruntime_genai
        config = onnxruntime_genai.Config(str(self.path()))
        options = {"session_options": {"intra_op_num_threads": self.threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self.model = onnxruntime_genai.Model(config)

    def _start(self, prompts: Sequence[Sequence[int]], new: int) -> Any:
        import numpy as np

        options = self.lib.GeneratorParams(self.model)
        most = len(prompts[0]) + new
        options.set_search_options(
            batch_size=len(prompts), max_length=most, min_length=most, do_sample=False, num_beams=1
        )
        generator = self.lib.Generator(self.model, options)
        generator.append_tokens(np.array([list(p) for p in prompts], dtype=np.int32))
        generator.generate_next_token()
        return generator

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Greedy, one token per step."""
        generator = self._start(prompts, new)
        for _ in range(new - 1):
            generator.generate_next_token()
        return [list(generator.get_sequence(i))[len(p) :] for i, p in enumerate(prompts)]

    def decode_seconds(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """The steps after the first token."""
        generator = self._start(prompts, 1 + new)
        begin = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return time.perf_counter() - begin


class GenAIInt4(GenAI):
    """4-bit blocks of 32."""

    precision = "q4"
    bytes_a_weight = 18 / 32
    built = "int4"
