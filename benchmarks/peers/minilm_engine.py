"""minilm through its public interface: SentenceEncoder, and the engine of LLM and generate."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from ..shapes import ENCODERS
from .base import Assets, Engine, Unavailable


class MiniLM(Engine):
    """Weights in float32, the automatic choice of implementations."""

    encoder = decoder = True
    devices = ("cpu", "cuda")
    only_real_models = False
    copies = 2.5  # as they came, and packed for the kernels
    backend = ""
    dtype = "float32"
    """On a GPU, float16."""
    weights: str | None = None
    """The argument `weights=` of `from_pretrained`."""
    kv_cache = "auto"
    """The argument `kv_cache_dtype=` of `LLM`."""
    source = "folder"

    def __init__(self, assets: Assets, threads: int, device: str = "cpu") -> None:
        super().__init__(assets, threads, device)
        if self.backend:
            os.environ["MINILM_BACKEND"] = self.backend

    def load(self) -> None:
        """Load the encoder or decoder. Raises Unavailable when minilm has no such weights."""
        import torch

        torch.set_num_threads(self.threads)
        half = self.device != "cpu" and self.dtype == "float32"
        options: dict[str, Any] = {"dtype": getattr(torch, "float16" if half else self.dtype)}
        if self.weights is not None:
            options["weights"] = self.weights
        try:
            if self.assets.model in ENCODERS:
                from minilm import SentenceEncoder

                extra = {"model_kwargs": {"weights": options.pop("weights")}} if self.weights else {}
                self.model: Any = SentenceEncoder(self.assets.folder, device=self.device, **options, **extra)
                self.unit = any(type(module).__name__ == "Normalize" for module in self.model.heads)
                return
            from minilm import AutoModelForCausalLM

            path = self.assets.gguf if self.weights == "gguf" else self.assets.folder
            self.model = AutoModelForCausalLM.from_pretrained(path, device=self.device, **options)
        except TypeError as error:
            if self.weights is not None and "weights" in str(error):
                raise Unavailable(f"minilm has no {self.weights} weights yet") from None
            raise

    def embed_ids(self, batch: Sequence[Sequence[int]]) -> Any:
        """SentenceEncoder's forward on ids that are ready; padding, if there is any, goes at its border."""
        import torch

        features = {}
        if len({len(ids) for ids in batch}) == 1:
            ids = torch.tensor(batch)
        else:
            lengths = torch.tensor([len(ids) for ids in batch])
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            ids = torch.zeros(mask.shape, dtype=torch.int64)
            ids[mask] = torch.tensor([token for row in batch for token in row])
            features["attention_mask"] = mask.to(self.device)
        with torch.inference_mode():
            features["input_ids"] = ids.to(self.device)
            sentence = self.model(features)["sentence_embedding"].float()
            if not self.unit:
                sentence = torch.nn.functional.normalize(sentence, dim=1)
            return sentence.cpu().numpy()

    def embed_texts(self, texts: Sequence[str]) -> Any:
        """SentenceEncoder.encode."""
        return self.model.encode(list(texts), batch_size=32, normalize_embeddings=True)

    def _requests(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[Any, list[Any]]:
        from minilm.generation.engine import Engine as Runner
        from minilm.generation.engine import Request
        from minilm.generation.llm import CACHE_DTYPES
        from minilm.generation.sampling import Sampling

        cache = self.model.new_cache(dtype=CACHE_DTYPES[self.kv_cache])
        runner = Runner(self.model, max_num_batched_tokens=16384, together=True, cache=cache)
        requests = [Request(list(p), Sampling(do_sample=False), new, at_once=True) for p in prompts]
        for request in requests:
            runner.add(request)
        return runner, requests

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Greedy; no token ends a text."""
        runner, requests = self._requests(prompts, new)
        runner.run()
        return [request.samples[0].tokens for request in requests]

    def decode_seconds(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """The steps after the one that reads the prompts."""
        runner, _ = self._requests(prompts, 1 + new)
        runner.step()
        begin = time.perf_counter()
        runner.run()
        return time.perf_counter() - begin


class Reference(MiniLM):
    """The specification only, to show the gain of the fast paths."""

    backend = "reference"


class BFloat16(MiniLM):
    """Weights, keys and values in bfloat16."""

    precision = "bf16"
    bytes_a_weight = 2.0
    dtype = "bfloat16"
    only_real_models = True


class Int8(MiniLM):
    """8-bit weights, and keys and values in float16, as llama.cpp has them."""

    kv_cache = "float16"
    precision = "int8"
    bytes_a_weight = 1.0
    weights = "int8"
    only_real_models = True


class Q8(MiniLM):
    """8-bit weights with a scale for each 32 inputs: llama.cpp's Q8_0."""

    kv_cache = "float16"
    precision = "int8"
    bytes_a_weight = 34 / 32
    weights = "q8_0"
    only_real_models = True


class Q4(MiniLM):
    """The GGUF file as it is shipped: 4-bit blocks (Q4_1), the token table in 8 bits."""

    kv_cache = "float16"
    encoder = False
    precision = "q4"
    bytes_a_weight = 20 / 32
    weights = "gguf"
    only_real_models = True
