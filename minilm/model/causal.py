"""Causal language models: the head that predicts the next token, and decoding steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..cache import KVCache
from ..config import ConfigError
from ..families import Head, PretrainedConfig
from ..files import MOST_CONFIG, has_file, read_json
from ..quantized import QuantizedEmbedding
from .batch import Batch, Packed
from .heads import token_loss
from .layers import Embedding, Linear
from .outputs import CausalLMOutput, ModelOutput
from .pretrained import PreTrainedModel


class CausalLMHead(nn.Module):
    """A logit for each token of the vocabulary, by the (tied) token table or a separate output matrix."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        spec = model.spec
        self.decoder = (
            None if spec.tie_word_embeddings else Linear(spec.hidden_size, spec.vocab_size, bias=False)
        )
        self.bias = nn.Parameter(torch.zeros(spec.vocab_size)) if spec.head_bias else None
        self.soft_cap = spec.head_soft_cap

    def forward(self, hidden: Tensor, tokens: Embedding | QuantizedEmbedding) -> Tensor:
        """hidden [T, C], the token table -> logits [T, V]."""
        scores: Tensor = tokens.scores(hidden) if self.decoder is None else self.decoder(hidden)
        if self.bias is not None:
            scores = scores + self.bias
        if self.soft_cap is not None:
            scores = (scores / self.soft_cap).tanh() * self.soft_cap
        return scores


class AutoModelForCausalLM(PreTrainedModel):
    """A decoder with a language-model head: predicts the next token; `generate` continues prompts."""

    head_kind: ClassVar[Head] = "causal-lm"
    output_class: ClassVar[type[ModelOutput]] = CausalLMOutput

    def __init__(self, config: PretrainedConfig) -> None:
        from ..generation import GenerationConfig

        super().__init__(config)
        self.head = CausalLMHead(self)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.initialise()

    def answer(
        self, hidden: Tensor, batch: Batch, labels: Tensor | None, logits_to_keep: int = 0
    ) -> dict[str, Any]:
        """logits [B, S, V], or those of the last `logits_to_keep` columns only.

        labels int64 [B, S], shifted here: the target of a token is the label of the next token in its row.
        """
        packed = batch.packed
        if logits_to_keep and labels is None:
            packed, kept = packed.last_columns(logits_to_keep)
            hidden = hidden if kept is None else hidden[kept]
        logits = self.logits(hidden)
        return {"loss": token_loss(logits, labels, packed, shift=True), "logits": packed.pad(logits)}

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [T, C] -> [T, V]."""
        scores: Tensor = self.head(hidden, self.body.embeddings.tokens)
        return scores

    def step(self, tokens: Tensor, rows: Sequence[int], cache: KVCache) -> tuple[Tensor, Tensor]:
        """One decoding step, tokens int64 [B] -> logits [B, V] and their argmax, int64 [B]; see `steps`."""
        logits, best = self.steps(tokens, rows, cache, 1)
        return logits, best[0]

    def steps(
        self, tokens: Tensor, rows: Sequence[int], cache: KVCache, count: int, ends: Iterable[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Up to `count` greedy decoding steps. Sequence b is the cache's row ``rows[b]``; its next token is
        ``tokens[b]``, int64 [B].

        Each step feeds the most likely token to the next; the first step that gives one of `ends` is the
        last. Returns the logits of the last step, [B, V], and the most likely tokens of all steps that ran,
        int64 [steps, B]. The last step's tokens are not in the cache yet. After an error the cache is
        unchanged.
        """
        arguments = (self, tokens, rows, cache, count, frozenset(ends))
        found: tuple[Tensor, Tensor] = ops.run_whole("decode_step", tokens.device, self.dtype, *arguments)
        return found

    def run_steps(
        self, tokens: Tensor, rows: Sequence[int], cache: KVCache, count: int, ends: frozenset[int]
    ) -> tuple[Tensor, Tensor]:
        """Reference definition of `steps`: embeddings, blocks and head, one after the other."""
        device, batch = tokens.device, len(rows)
        borders = torch.arange(batch + 1, dtype=torch.int32, device=device)
        found: list[Tensor] = []
        with cache.restored(rows):
            while True:
                positions = torch.tensor([cache.lengths[row] for row in rows], device=device)
                packed = Packed(batch, 1, None, [1] * batch, borders, positions)
                logits = self.logits(self.run_packed(tokens, packed, cache=cache, rows=rows))
                tokens = logits.argmax(-1)
                found.append(tokens)
                if len(found) == count or (ends and not ends.isdisjoint(tokens.tolist())):
                    return logits, torch.stack(found)

    def generate(self, *args: Any, **options: Any) -> Any:
        """Continue prompts; see `minilm.generation.model_generate`."""
        from ..generation import generate

        return generate(self, *args, **options)

    def read_beside_weights(self, folder: Path) -> None:
        """Load generation_config.json, or else the generation options in config.json."""
        from ..generation import GenerationConfig

        file = folder / "generation_config.json"
        there = has_file(file, error=ConfigError)
        stored = read_json(file, limit=MOST_CONFIG, error=ConfigError) if there else {}
        self.generation_config = GenerationConfig.from_checkpoint(stored, self.config)


ops.register_modules("decode_step", AutoModelForCausalLM.run_steps)
