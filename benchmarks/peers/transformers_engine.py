"""transformers, with its eager attention, with PyTorch's fused attention, and under torch.compile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..shapes import ENCODERS
from .base import Engine


class Eager(Engine):
    """attn_implementation="eager"."""

    package = "transformers"
    encoder = decoder = True
    devices = ("cpu", "cuda")
    only_real_models = False
    attention = "eager"

    def load(self) -> None:
        """AutoModel or AutoModelForCausalLM, in float32 (float16 on a GPU)."""
        import torch
        import transformers

        torch.set_num_threads(self.threads)
        name = "AutoModel" if self.assets.model in ENCODERS else "AutoModelForCausalLM"
        dtype = torch.float32 if self.device == "cpu" else torch.float16
        self.model: Any = getattr(transformers, name).from_pretrained(
            self.assets.folder, dtype=dtype, attn_implementation=self.attention
        )
        self.model = self.model.eval().to(self.device)
        self.torch = torch

    def embed_ids(self, batch: Sequence[Sequence[int]]) -> Any:
        """Padded to the longest; mean over the real tokens, normalised."""
        torch = self.torch
        width = max(map(len, batch))
        ids = torch.tensor([[*row, *([0] * (width - len(row)))] for row in batch], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=self.device)
        with torch.inference_mode():
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            weight = mask.unsqueeze(2).to(hidden.dtype)
            mean = (hidden * weight).sum(1) / weight.sum(1)
            return torch.nn.functional.normalize(mean, dim=1).float().cpu().numpy()

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """model.generate, greedy, never stopping."""
        return self._generate(prompts, new, None)

    def _generate(self, prompts: Sequence[Sequence[int]], new: int, watch: Any) -> list[list[int]]:
        torch = self.torch
        ids = torch.tensor([list(p) for p in prompts], device=self.device)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                logits_processor=None if watch is None else [watch],
                **options,
            )
        return [row[ids.shape[1] :].tolist() for row in out]

    def decode_seconds(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """From the first token's logits to the last's, noted by a logits processor."""
        times: list[float] = []

        def watch(ids: Any, scores: Any) -> Any:
            if self.device == "cuda":
                self.torch.cuda.synchronize()
            times.append(time.perf_counter())
            return scores

        self._generate(prompts, 1 + new, watch)
        return times[-1] - times[0]


class Sdpa(Eager):
    """attn_implementation="sdpa", the default."""

    attention = "sdpa"


class Compiled(Sdpa):
    """torch.compile of the model, recompiled by shape until PyTorch makes the sizes dynamic; encoders only,
    on batches of one shape (on a mixed corpus it recompiles for minutes)."""

    decoder = False
    mixed = False

    def load(self) -> None:
        """Compiled on the first calls, which are not timed."""
        super().load()
        self.model = self.torch.compile(self.model, dynamic=False)

    def note(self) -> str:
        """Where it is not run."""
        return "not run on the corpus: each new shape is compiled again"
