"""sentence-transformers, as its documentation shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Engine


class SentenceTransformers(Engine):
    """SentenceTransformer(folder).encode(texts)."""

    package = "sentence-transformers"
    encoder = True
    devices = ("cpu", "cuda")

    def load(self) -> None:
        """In float32."""
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(self.threads)
        self.torch = torch
        self.model: Any = SentenceTransformer(
            str(self.assets.folder), device=self.device, local_files_only=True
        )
        self.model.max_seq_length = 256

    def embed_texts(self, texts: Sequence[str]) -> Any:
        """Sorted by length and batched by the library itself."""
        return self.model.encode(
            list(texts), batch_size=32, normalize_embeddings=True, show_progress_bar=False
        )

    def embed_ids(self, batch: Sequence[Sequence[int]]) -> Any:
        """Its forward pass on token ids."""
        torch = self.torch
        width = max(map(len, batch))
        ids = torch.tensor([[*row, *([0] * (width - len(row)))] for row in batch], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=self.device)
        with torch.inference_mode():
            features = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
            return self.model(features)["sentence_embedding"].float().cpu().numpy()
