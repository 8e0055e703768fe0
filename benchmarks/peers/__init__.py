"""The other libraries that minilm is compared with: one small file per peer, with a pinned version. A peer
that cannot run is skipped with the reason.

Two kinds, found by name in two tables. An *op peer* computes one op in this process. An *engine* runs whole
models, in a separate process (`minilm.benchmarks.workers`), because thread pools and OpenMP runtimes of
several libraries conflict. A peer is imported only when it is used. The versions are in
constraints-peers.txt."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .base import Engine, OpPeer, Skipped

OP_PEERS = ("eager", "compiled", "sdpa", "flex", "liger", "flash_attn")
"""Modules with `op_peers(case, device, dtype) -> list[OpPeer | Skipped]`."""

ENGINES: dict[str, str] = {
    "minilm": "minilm_engine:MiniLM",
    "minilm reference": "minilm_engine:Reference",
    "minilm bf16": "minilm_engine:BFloat16",
    "minilm int8": "minilm_engine:Int8",
    "minilm q8_0": "minilm_engine:Q8",
    "minilm q4_1": "minilm_engine:Q4",
    "transformers eager": "transformers_engine:Eager",
    "transformers sdpa": "transformers_engine:Sdpa",
    "transformers compiled": "transformers_engine:Compiled",
    "sentence-transformers": "sentence_transformers_engine:SentenceTransformers",
    "onnxruntime": "onnxruntime_engine:OnnxRuntime",
    "onnxruntime int8": "onnxruntime_engine:OnnxRuntimeInt8",
    "openvino": "openvino_engine:OpenVino",
    "openvino bf16": "openvino_engine:OpenVinoBf16",
    "openvino genai f32": "openvino_genai_engine:OpenVinoGenAIF32",
    "openvino genai f16": "openvino_genai_engine:OpenVinoGenAI",
    "ctranslate2": "ctranslate2_engine:CTranslate2",
    "ctranslate2 int8": "ctranslate2_engine:CTranslate2Int8",
    "onnxruntime genai": "onnxruntime_genai_engine:GenAI",
    "onnxruntime genai int4": "onnxruntime_genai_engine:GenAIInt4",
    "llama.cpp f32": "llama_cpp_engine:F32",
    "llama.cpp f16": "llama_cpp_engine:F16",
    "llama.cpp q8_0": "llama_cpp_engine:Q8",
    "llama.cpp q4_1": "llama_cpp_engine:Q4",
}
"""Engine name -> module:class. The order is that of the tables."""

__all__ = ["ENGINES", "OP_PEERS", "Engine", "OpPeer", "Skipped", "engine_class", "op_peers"]


def engine_class(name: str) -> type[Engine]:
    """The class of an engine. Raises ValueError for a name that is not in the table."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; expected one of {', '.join(ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    found: type[Engine] = getattr(import_module(f".{module}", __name__), attribute)
    return found


def op_peers(case: Any, device: str, dtype: Any) -> list[OpPeer | Skipped]:
    """All op peers that apply to `case`, the skipped ones with the reason."""
    found: list[OpPeer | Skipped] = []
    for module in OP_PEERS:
        found += import_module(f".{module}", __name__).op_peers(case, device, dtype)
    return found
