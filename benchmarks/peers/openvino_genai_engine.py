"""OpenVINO GenAI reading a GGUF file with float16 weights (its reader supports neither Q4_1 nor float32). It
computes in bfloat16 on processors that support it, or in float32 if configured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from .base import Unavailable
from .llama_cpp_engine import F16


class OpenVinoGenAI(F16):
    """LLMPipeline on the file that llama.cpp's quantiser makes; needs llama-cpp-python once, to make it."""

    package = "openvino-genai"
    settings: ClassVar[dict[str, Any]] = {"ATTENTION_BACKEND": "SDPA"}

    def load(self) -> None:
        """Load on the CPU."""
        import openvino_genai

        self.lib = openvino_genai
        settings = self.settings | {"INFERENCE_NUM_THREADS": self.threads}
        self.pipe: Any = openvino_genai.LLMPipeline(str(self.path()), "CPU", **settings)

    def _config(self, new: int) -> Any:
        config = self.lib.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        return config

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Greedy, on ids."""
        import numpy as np
        import openvino

        if len(prompts) > 1:
            raise Unavailable("its stateful pipeline is run with one sequence here")
        ids = openvino.Tensor(np.array([list(prompts[0])], dtype=np.int64))
        mask = openvino.Tensor(np.ones((1, len(prompts[0])), dtype=np.int64))
        found = self.pipe.generate(self.lib.TokenizedInputs(ids, mask), self._config(new))
        return [list(row) for row in found.tokens]

    def decode_seconds(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """The time of 1 + new tokens minus that of 1 token."""
        begin = time.perf_counter()
        self.generate(prompts, 1)
        middle = time.perf_counter()
        self.generate(prompts, 1 + new)
        return time.perf_counter() - middle - (middle - begin)


class OpenVinoGenAIF32(OpenVinoGenAI):
    """The same weights with float32 arithmetic, for comparison with others that compute in float32."""

    precision = "fp32"
    settings: ClassVar[dict[str, Any]] = OpenVinoGenAI.settings | {"INFERENCE_PRECISION_HINT": "f32"}

    def note(self) -> str:
        """Which file, and what is done with it."""
        return f"{super().note()}; float16 weights, float32 arithmetic"
