"""ONNX Runtime on an ONNX export of the encoder by PyTorch, in float32 and with dynamically quantised 8-bit
weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Engine


def export(engine: Engine) -> Path:
    """The encoder as ONNX, with the number of sequences and tokens open; made once by torch.onnx from
    transformers' model."""
    target = engine.assets.cache / "onnx" / "model.onnx"
    if target.is_file():
        return target
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(
        engine.assets.folder, dtype=torch.float32, attn_implementation="eager", add_pooling_layer=False
    ).eval()

    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    target.parent.mkdir(parents=True, exist_ok=True)
    ids = torch.randint(5, 200, (2, 8))
    axes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("tokens", min=2, max=512)}
    torch.onnx.export(
        Body(),
        (ids, torch.ones_like(ids)),
        str(target),
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden"],
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        dynamo=True,
        external_data=False,
    )
    return target


def pooled(hidden: Any, mask: Any) -> Any:
    """Mean over the real tokens, normalised; NumPy [B, S, C], [B, S] -> [B, C]."""
    import numpy as np

    weight = mask[..., None].astype(hidden.dtype)
    mean = (hidden * weight).sum(1) / weight.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def padded(batch: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Ids and mask int64 [B, S], padded with 0 on the right."""
    import numpy as np

    width = max(map(len, batch))
    ids = np.zeros((len(batch), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


class OnnxRuntime(Engine):
    """float32, all graph optimisations."""

    package = "onnxruntime"
    encoder = True
    file = "model.onnx"

    def prepare(self) -> None:
        """Export, and fuse attention, norms and activations offline with onnxruntime's transformer
        optimiser."""
        source = export(self)
        target = source.with_name("fused.onnx")
        if not target.is_file():
            import json

            from onnxruntime.transformers import optimizer

            config = json.loads((self.assets.folder / "config.json").read_text())
            heads, size = config["num_attention_heads"], config["hidden_size"]
            optimizer.optimize_model(
                str(source), "bert", num_heads=heads, hidden_size=size, opt_level=0
            ).save_model_to_file(str(target))

    def path(self) -> Path:
        """The file that is run."""
        return self.assets.cache / "onnx" / "fused.onnx"

    def load(self) -> None:
        """A session with the threads asked for."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        self.session: Any = onnxruntime.InferenceSession(
            str(self.path()), options, providers=["CPUExecutionProvider"]
        )

    def embed_ids(self, batch: Sequence[Sequence[int]]) -> Any:
        """Padded to the longest."""
        ids, mask = padded(batch)
        return pooled(self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0], mask)

    def note(self) -> str:
        """How the model was made."""
        return "torch.onnx export, fused by onnxruntime.transformers"


class OnnxRuntimeInt8(OnnxRuntime):
    """Dynamic 8-bit quantisation (weights per channel)."""

    precision = "int8"
    bytes_a_weight = 1.0

    def prepare(self) -> None:
        """Quantise the fused model once."""
        super().prepare()
        if not self.path().is_file():
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(
                str(self.path().with_name("fused.onnx")),
                str(self.path()),
                weight_type=QuantType.QInt8,
                per_channel=True,
            )

    def path(self) -> Path:
        """The file that is run."""
        return self.assets.cache / "onnx" / "int8.onnx"
