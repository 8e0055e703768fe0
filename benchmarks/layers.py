"""The layer level: one block of each model, compared with transformers' layer with the same random
weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from minilm import ops
from minilm.model import Batch, pack, rope

from . import check, costs, harness, machine, shapes
from .limits import Limits
from .ops import cache_bytes
from .shapes import Regime

Call = Callable[[Tensor], Tensor]


def build(model: str) -> tuple[Any, dict[str, Any]]:
    """(our model of one layer, {attention: transformers' model of one layer}) with the same weights, in
    float32."""
    import transformers

    from minilm import AutoModel
    from minilm.families.pretrained_config import PretrainedConfig

    torch.manual_seed(1)
    config = PretrainedConfig.from_dict({"initializer_range": 0.05, **shapes.hf_config(model, layers=1)})
    ours = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 1:  # norms at one and biases at zero would hide mistakes
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = {
            kind: transformers.AutoModel.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=kind
            ).eval()
            for kind in ("eager", "sdpa")
        }
    return ours, theirs


def our_layer(model: Any, regime: Regime) -> Call:
    """x [T, C] -> the output of the block, [T, C]; packed."""
    spec, device = model.spec, model.device
    batch, length = len(regime.lengths), regime.lengths[0]
    packed = pack(batch, length, None, device)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    turn = None
    if spec.rope is not None:
        cos, sin = rope.angles(spec.rope, spec.head_dim, packed.positions, None)
        turn = cos.to(wide), sin.to(wide)
    shared = Batch(torch.empty(0), packed.positions, packed, rope=turn)
    block = model.body.layers[0]

    def call(x: Tensor) -> Tensor:
        y, delta = block(x, None, shared)
        return y if delta is None else y + delta

    return call


def their_layer(model: Any, regime: Regime, kind: str) -> Call:
    """transformers' layer on [B, S, C], with minilm's packed shape outside."""
    batch, length = len(regime.lengths), regime.lengths[0]
    family = model.config.model_type
    options: dict[str, Any] = {}
    if family in ("gpt2", "llama") and kind == "eager":
        hidden = torch.full((length, length), float("-inf"), device=model.device).triu(1)
        options["attention_mask"] = hidden.expand(batch, 1, length, length).to(model.dtype)
    if family == "bert":
        layer = model.encoder.layer[0]
    elif family == "gpt2":
        layer = model.h[0]
    else:
        layer = model.layers[0]
        positions = torch.arange(length, device=model.device)[None]
        example = torch.zeros(1, length, model.config.hidden_size, dtype=model.dtype, device=model.device)
        options["position_embeddings"] = model.rotary_emb(example, positions)

    def call(x: Tensor) -> Tensor:
        out = layer(x.view(batch, length, -1), **options)
        return (out[0] if isinstance(out, tuple) else out).flatten(0, 1)

    return call


def run_model(
    model: str,
    limits: Limits,
    settings: harness.Settings,
    threads: int,
    device: str,
    dtype: torch.dtype,
    wanted: Callable[[str], bool],
    chosen: Callable[[str], bool],
    measure: Callable[..., dict[str, harness.Samples]] = harness.measure,
    block_of: Callable[..., harness.Block] = harness.block_of,
) -> Iterator[dict[str, Any]]:
    """One cell for each implementation in each regime without a past."""
    regimes = [r for r in shapes.regimes(model) if not r.decoding and chosen(f"layer of {model} {r.name}")]
    if not regimes:
        return
    ours, theirs = build(model)
    truth_model = copy.deepcopy(ours).double()
    ours.to(device, dtype)
    for other in theirs.values():
        other.to(device, dtype)
    spec = shapes.spec(model, layers=1)
    size = dtype.itemsize
    for regime in regimes:
        calls = [c for c in costs.forward(spec, regime.lengths, b=size, wb=size) if c.where != "embeddings"]
        cost = costs.total(calls) + costs.Cost(
            regime.tokens * spec.hidden_size * size, regime.tokens * spec.hidden_size * size
        )
        floor, binding = limits.floor(
            cost, str(dtype).removeprefix("torch."), threads if device == "cpu" else None
        )

        def draw(g: torch.Generator, tokens: int = regime.tokens) -> Tensor:
            return torch.randn(tokens, spec.hidden_size, generator=g).to(device, dtype)

        engines: dict[str, tuple[Call, str]] = {
            "minilm": (our_layer(ours, regime), "auto"),
            "minilm reference": (our_layer(ours, regime), "reference"),
            "transformers eager": (their_layer(theirs["eager"], regime, "eager"), "auto"),
            "transformers sdpa": (their_layer(theirs["sdpa"], regime, "sdpa"), "auto"),
        }
        if not machine.tiny():
            compiled = torch.compile(their_layer(theirs["sdpa"], regime, "sdpa"), dynamic=False)
            engines["transformers compiled"] = (compiled, "auto")
        draws = [draw(torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        exact = our_layer(truth_model, regime)

        def truth(x: Tensor, exact: Call = exact) -> Tensor:
            with ops.backend("reference"):
                return exact(x)

        eager = engines["transformers eager"][0]
        cells, blocks = [], {}
        inputs = harness.rotated(draw, seed=3, cache=cache_bytes(device))
        for name, (call, backend) in engines.items():
            if not wanted(name):
                continue
            cell: dict[str, Any] = {
                "level": "layer",
                "model": model,
                "workload": f"layer of {model} {regime.name}",
                "peer": name,
                "ours": name.startswith("minilm"),
                "precision": "fp32" if size == 4 else "fp16",
                "dtype": str(dtype).removeprefix("torch."),
                "device": device,
                "threads": threads,
                "unit": "tokens",
                "units_per_call": regime.tokens,
                "bytes": cost.bytes,
                "written": cost.written,
                "arithmetic": str(dtype).removeprefix("torch."),
                "operations": cost.operations,
                "floor_seconds": floor,
                "binding": binding,
            }
            with ops.backend(backend):
                verdict = check.compare(call, eager, truth, draws)
            cell |= {"status": "ok" if verdict.ok else "wrong", "check": verdict.to_dict()}
            cell["reason"] = verdict.detail or None
            if verdict.ok:
                blocks[name] = block_of(call, inputs, lambda backend=backend: ops.backend(backend))
            cells.append(cell)
        for name, samples in measure(blocks, settings).items():
            cell = next(c for c in cells if c["peer"] == name)
            cell |= {"samples": samples.seconds, "calls": samples.calls}
        yield from cells
