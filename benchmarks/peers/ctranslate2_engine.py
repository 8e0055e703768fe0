"""CTranslate2, encoders and decoders, converted by its converter from the transformers folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..shapes import ENCODERS
from .base import Engine


class CTranslate2(Engine):
    """float32."""

    package = "ctranslate2"
    encoder = decoder = True
    compute = "float32"

    def path(self) -> Path:
        """The converted model; one file serves every precision, which is chosen at load."""
        return self.assets.cache / "ctranslate2"

    def prepare(self) -> None:
        """Convert once."""
        if (self.path() / "model.bin").is_file():
            return
        shutil.rmtree(self.path(), ignore_errors=True)
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(self.assets.folder)).convert(str(self.path()))

    def load(self) -> None:
        """One replica with the threads asked for."""
        import ctranslate2

        options = {
            "device": "cpu",
            "compute_type": self.compute,
            "intra_threads": self.threads,
            "inter_threads": 1,
        }
        kind = ctranslate2.Encoder if self.assets.model in ENCODERS else ctranslate2.Generator
        self.model: Any = kind(str(self.path()), **options)

    def embed_ids(self, batch: Sequence[Sequence[int]]) -> Any:
        """Padded inside by the library."""
        import numpy as np

        from .onnxruntime_engine import pooled

        out = self.model.forward_batch([list(ids) for ids in batch])
        hidden = np.asarray(out.last_hidden_state)
        lengths = np.array([len(ids) for ids in batch])
        mask = (np.arange(hidden.shape[1])[None] < lengths[:, None]).astype(np.int64)
        return pooled(hidden, mask)

    def _words(self, ids: Sequence[int]) -> list[str]:
        if not hasattr(self, "_vocabulary"):
            import json

            self._vocabulary = json.loads((self.path() / "vocabulary.json").read_text())
        return [self._vocabulary[i] for i in ids]

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """generate_batch, greedy; `min_length` keeps it from stopping."""
        results = self.model.generate_batch(
            [self._words(p) for p in prompts],
            max_length=new,
            min_length=new,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [list(r.sequences_ids[0]) for r in results]


class CTranslate2Int8(CTranslate2):
    """8-bit weights and activations, float32 between the products."""

    precision = "int8"
    bytes_a_weight = 1.0
    compute = "int8_float32"
