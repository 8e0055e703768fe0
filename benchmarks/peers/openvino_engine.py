"""OpenVINO on the same ONNX export, in float32 and in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Engine
from .onnxruntime_engine import export, padded, pooled


class OpenVino(Engine):
    """CPU plugin, tuned for latency, float32 arithmetic."""

    package = "openvino"
    encoder = True
    arithmetic = "f32"
    """The precision that the CPU plugin is set to."""

    def prepare(self) -> None:
        """ONNX -> OpenVINO's format."""
        target = self.assets.cache / "openvino" / "model.xml"
        if not target.is_file():
            import openvino

            target.parent.mkdir(parents=True, exist_ok=True)
            openvino.save_model(
                openvino.convert_model(str(export(self))), str(target), compress_to_fp16=False
            )

    def load(self) -> None:
        """Compile the model for the CPU."""
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": self.arithmetic,
        }
        path = self.assets.cache / "openvino" / "model.xml"
        self.model: Any = openvino.Core().compile_model(str(path), "CPU", settings)
        self.request = self.model.create_infer_request()

    def embed_ids(self, batch: Sequence[Sequence[int]]) -> Any:
        """Padded to the longest."""
        ids, mask = padded(batch)
        found = self.request.infer({"input_ids": ids, "attention_mask": mask})
        return pooled(next(iter(found.values())), mask)

    def note(self) -> str:
        """How the model was made."""
        return "torch.onnx export, converted by openvino"


class OpenVinoBf16(OpenVino):
    """Products in bfloat16; on processors without them it stays in float32."""

    precision = "bf16"
    bytes_a_weight = 2.0
    only_real_models = True
    arithmetic = "bf16"
