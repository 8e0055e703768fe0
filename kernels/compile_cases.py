"""Cases of the compile report: calls of the launchers at the shapes of real models.

A case only calls the launcher, and `launches` records what the launcher requests from Triton: kernels, types
of arguments and which of them are divisible by 16, constants, warps and stages, as the heuristics choose them
for a chip. Nothing runs, and no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from . import (
    activation,
    attention,
    attention_short,
    cross_entropy,
    decode,
    linear_cross_entropy,
    norm,
    quantized_matmul,
    rope,
)
from .devices import CHIPS, Device, assume
from .registration import INTERPRETED

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Expected(NamedTuple):
    """Requirements on the machine code of one jit function."""

    tensor_cores: str = ""
    """"full": the chip's largest instruction (mma.sync, wgmma, tcgen05) and no smaller one; "small": any, for
    tiles of fewer rows than wgmma has; "": none."""
    width: int = 16
    """At least half of the bytes are loaded by instructions of this width; 0: any width."""
    optional: bool = False
    """True if the launch depends on the chip."""
    spills: Mapping[str, str] = {}
    """Chips on which registers may spill to memory, with the reason why that is accepted."""


class Case(NamedTuple):
    """One call at a shape in use."""

    kernel: str
    """The file in kernels/."""
    name: str
    call: Callable[[], object]
    expected: Mapping[str, Expected]
    """Requirements by jit function, for all that the call launches."""


class Launch(NamedTuple):
    """A recorded compilation request to Triton; plain data, so that another process can compile it."""

    module: str
    function: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int


class _Driver:
    """A stand-in for Triton's driver, for a chip that is not present."""

    def __init__(self, device: Device) -> None:
        self.capability = 10 * device.capability[0] + device.capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps the target by the number of the device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Inside, launchers configure for `device`; launches are recorded in the list instead of run."""
    if INTERPRETED:
        raise RuntimeError("Triton's interpreter runs kernels immediately: start without TRITON_INTERPRET")
    found: list[Launch] = []

    def note(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        (attributes,) = compile["configs"]
        found.append(
            Launch(
                fn.module, fn.name, compile["signature"], compile["constants"], attributes,
                compile["num_warps"], compile["num_stages"],
            )
        )  # fmt: skip
        return True  # done: neither compiled nor launched

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    driver.set_active(_Driver(device))
    try:
        with assume(device):
            yield found
    finally:
        if torch.cuda.is_available():  # else there is no driver to go back to
            driver.reset_active()
        knobs.runtime.jit_cache_hook = before


def launches(case: Case, chip: str) -> list[Launch]:
    """The launches of the case on `chip`; raises if they are not those that the case expects."""
    with recording(CHIPS[chip]) as found:
        case.call()
    names = {launch.function for launch in found}
    needed = {name for name, expected in case.expected.items() if not expected.optional}
    if not needed <= names <= set(case.expected):
        wanted = f"expected {sorted(case.expected)}"
        raise ValueError(f"{case.kernel}, {case.name}: launches {sorted(names)}, {wanted}")
    return found


def _norm(name: str, channels: int, dtype: torch.dtype, *, add: bool = True, rms: bool = False) -> Case:
    """4,096 rows, forward and backward."""

    def call() -> None:
        x = torch.empty(4096, channels, dtype=dtype, requires_grad=True)
        w = torch.empty(channels, dtype=dtype)
        y, total, _, _ = norm.norm(x, x.detach() if add else None, w, None if rms else w, 1e-5, rms)
        torch.autograd.backward([y, total] if add else [y], [y, total] if add else [y])

    kind = ("add_" if add else "") + ("rms_norm" if rms else "layer_norm")
    columns = Expected(width=8)  # the second tile has four columns a lane
    expected = {"_forward": columns, "_backward": columns}
    return Case("norm", f"{name}, {kind}, C={channels}, {_short(dtype)}", call, expected)


def _attention(
    name: str, length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *,
    causal: bool = False, window: int = 0, cap: float = 0.0, bias: bool = False, alibi: bool = False,
    dropout: float = 0.0, lse: bool = True,
    **expected: Expected,
) -> Case:  # fmt: skip
    """Two sequences of `length`, with q, k and v contiguous as in the fused projection; forward and backward,
    or without the log-sum-exp only the forward."""

    def call() -> None:
        packed = torch.empty(2 * length, heads + 2 * kv_heads, head_dim, dtype=dtype, requires_grad=lse)
        q, k, v = torch.split(packed, [heads, kv_heads, kv_heads], dim=1)
        cu = _cumulative(length, length)
        b = torch.empty(heads, length, length, dtype=dtype, requires_grad=True) if bias else None
        slopes = torch.empty(heads) if alibi else None
        o, _ = attention.attention_op(
            q, k, v, b, slopes, cu, cu, length, length, head_dim**-0.5, causal, window, cap, dropout, 1, lse
        )
        if lse:
            o.backward(o)

    dots = Expected("full" if dtype != FP32 else "")
    options = {"causal": causal, f"window {window}": window, "soft-cap": cap, "ALiBi": alibi}
    options |= {"bias": bias, "dropout": dropout, "inference": not lse}
    title = ", ".join([name, f"D={head_dim}", f"S={length}", *(n for n, on in options.items() if on)])
    functions = {"_forward": dots}
    if lse:
        functions |= {"_dq": dots, "_dkdv": dots} | ({"_dbias": dots} if bias else {})
    return Case("attention", f"{title}, {_short(dtype)}", call, functions | expected)


def _attention_short(
    name: str, length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *,
    sequences: int = 64, causal: bool = False, window: int = 0, lse: bool = False,
) -> Case:  # fmt: skip
    """The forward of sequences of `length`, with q, k and v contiguous."""

    def call() -> None:
        packed = torch.empty(sequences * length, heads + 2 * kv_heads, head_dim, dtype=dtype)
        q, k, v = packed.split_with_sizes([heads, kv_heads, kv_heads], dim=1)
        cu = _cumulative(*[length] * sequences)
        scale = head_dim**-0.5
        attention_short.attention_short_op(q, k, v, cu, cu, length, length, scale, causal, window, lse)

    options = {"causal": causal, f"window {window}": window, "training": lse}
    kind = [n for n, on in options.items() if on]
    title = ", ".join([name, f"D={head_dim}", f"{sequences} x S={length}", *kind])
    expected = {"_forward": Expected("full" if dtype != FP32 else "")}
    return Case("attention_short", f"{title}, {_short(dtype)}", call, expected)


def _decode(
    name: str, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, batch: int = 1, new: int = 1,
    context: int = 4096, cache: torch.dtype | None = None,
) -> Case:  # fmt: skip
    """`new` tokens of each of `batch` sequences over a paged cache, split as chosen for the chip."""

    def call() -> None:
        pages = torch.empty(batch * context // 16, 16, kv_heads, head_dim, dtype=cache or dtype)
        scales = torch.empty(pages.shape[:-1]) if cache == torch.int8 else None
        decode.paged_attention_op(
            torch.empty(batch * new, heads, head_dim, dtype=dtype), pages, pages, scales, scales,
            torch.empty(batch, context // 16, dtype=torch.int32), _cumulative(*[new] * batch),
            torch.full([batch], context, dtype=torch.int32), new, context, head_dim**-0.5, 0, 0,
        )  # fmt: skip

    title = f"{name}, D={head_dim}, {batch} x {new} after {context}, {_short(cache or dtype)} cache"
    # The rows of one decode step are fewer than wgmma has; int8 pages have 8 elements a lane.
    dots = "" if dtype == FP32 else "full" if new * heads // kv_heads > 16 else "small"
    width = 16 if cache != torch.int8 else 8 if new == 1 else 4  # codes of a tile are few a lane
    expected = {"_decode": Expected(dots, width=width)}
    expected["_combine"] = Expected(width=0, optional=True)
    return Case("decode", title, call, expected)


def _rope(name: str, heads: int, kv_heads: int, head_dim: int, cache: torch.dtype = BF16) -> Case:
    """Alone, and with the append to a cache."""

    def call() -> None:
        packed = torch.empty(512, heads + 2 * kv_heads, head_dim, dtype=BF16)
        q, k, v = torch.split(packed, [heads, kv_heads, kv_heads], dim=1)
        cos = torch.empty(512, head_dim // 2)
        pages = torch.empty(64, 16, kv_heads, head_dim, dtype=cache)
        scales = torch.empty(pages.shape[:-1]) if cache == torch.int8 else None
        rope.rope_op(q, k, cos, cos, False)
        rope.rope_append(q, k, v, cos, cos, pages, pages.clone(), torch.arange(512), scales, scales)

    expected = dict.fromkeys(("_rope", "_append"), Expected(width=4))
    return Case("rope", f"{name}, D={head_dim}, {_short(cache)} cache", call, expected)


def _activation(name: str, features: int, kind: str, gated: bool, dtype: torch.dtype) -> Case:
    """4,096 rows, forward and backward."""

    def call() -> None:
        x = torch.empty(4096, features * (1 + gated), dtype=dtype, requires_grad=True)
        bias = torch.empty(features, dtype=dtype)
        y = activation.gated_op(x, kind) if gated else activation.bias_activation(x, bias, kind)
        torch.autograd.backward(y, y)

    functions = ("_gated", "_gated_backward") if gated else ("_forward", "_backward")
    title = f"{name}, {'gated ' if gated else 'bias + '}{kind}, F={features}, {_short(dtype)}"
    return Case("activation", title, call, dict.fromkeys(functions, Expected()))


def _loss(name: str, channels: int, vocabulary: int, dtype: torch.dtype, linear: bool = False) -> Case:
    """Of 64 rows; with the last linear layer or from logits."""

    def call() -> None:
        labels = torch.zeros(64, dtype=torch.int64)
        if linear:
            h = torch.empty(64, channels, dtype=dtype, requires_grad=True)
            linear_cross_entropy.linear_cross_entropy(
                h, torch.empty(vocabulary, channels, dtype=dtype), labels, -100
            )
        else:
            x = torch.empty(64, vocabulary, dtype=dtype, requires_grad=True)
            torch.autograd.backward(cross_entropy.cross_entropy(x, labels, -100))

    kind = "linear + cross-entropy" if linear else "cross-entropy"
    row = Expected(width=16 if vocabulary % 16 == 0 else dtype.itemsize)  # else rows begin anywhere
    expected = {"_forward": row, "_gradient": row}
    return Case("cross_entropy", f"{name}, {kind}, V={vocabulary}, {_short(dtype)}", call, expected)


def _quantized(
    name: str, ins: int, outs: int, form: str, rows: int, dtype: torch.dtype = BF16, kind: str = "linear"
) -> Case:
    """The product of `rows` rows with a quantised weight [outs, ins]."""

    def call() -> None:
        four, grouped = form.startswith("q4"), form != "int8"
        codes = torch.empty(outs, ins // 2 if four else ins, dtype=torch.uint8 if four else torch.int8)
        scale = torch.empty(outs, ins // 32, dtype=FP16) if grouped else torch.empty(outs)
        minimum = scale if form == "q4_1" else None
        x = torch.empty(rows, ins, dtype=dtype)
        quantized_matmul.quantized_linear_op(x, form, codes, scale, minimum, None, kind)

    expected = {"_matmul": Expected("full" if dtype != FP32 else "", width=8)}
    expected["_combine"] = Expected(width=4, optional=True)
    return Case(
        "quantized_matmul", f"{name}, {rows} x {ins} -> {outs}, {form}, {_short(dtype)}", call, expected
    )


def _cumulative(*lengths: int) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.int8: "int8"}[dtype]


BIASED = {"sm_90": "16 bytes beside 255 registers; the smaller tiles that avoid it lose wgmma in a product"}

CASES = (
    _norm("MiniLM", 384, BF16),
    _norm("MiniLM", 384, FP16),
    _norm("MiniLM", 384, FP32),
    _norm("BERT-base", 768, BF16, add=False),
    _norm("GPT-2", 768, FP16),
    _norm("SmolLM2", 576, BF16, rms=True),
    _norm("Llama-1B", 2048, BF16, rms=True),
    _norm("Llama-8B", 4096, BF16, rms=True),
    _norm("Llama-8B", 4096, FP32, add=False, rms=True),
    _attention_short("MiniLM", 64, 12, 12, 32, FP16),
    _attention_short("MiniLM", 128, 12, 12, 32, BF16),
    _attention_short("MiniLM", 256, 12, 12, 32, BF16),
    _attention_short("MiniLM", 256, 12, 12, 32, BF16, lse=True),
    _attention_short("MiniLM", 256, 12, 12, 32, FP16, sequences=1),
    _attention_short("MiniLM", 64, 12, 12, 32, FP32),
    _attention_short("BERT-base", 128, 12, 12, 64, BF16),
    _attention_short("BERT-base", 128, 12, 12, 64, BF16, lse=True),
    _attention_short("SmolLM2", 128, 9, 3, 64, BF16, causal=True),
    _attention_short("SmolLM2", 128, 9, 3, 64, BF16, causal=True, lse=True),
    _attention_short("ModernBERT", 128, 12, 12, 64, BF16, window=65),
    _attention_short("tiny", 128, 8, 8, 16, FP16, causal=True, window=33),
    _attention("MiniLM", 128, 12, 12, 32, BF16),
    _attention("MiniLM", 512, 12, 12, 32, FP16),
    _attention("MiniLM", 512, 12, 12, 32, FP16, lse=False),
    _attention("MiniLM", 512, 12, 12, 32, FP32),
    _attention("BERT-base", 512, 12, 12, 64, BF16, dropout=0.1),
    _attention("GPT-2", 1024, 12, 12, 64, FP16, causal=True),
    _attention("SmolLM2", 2048, 9, 3, 64, BF16, causal=True),
    _attention("SmolLM2", 2048, 9, 3, 64, BF16, causal=True, lse=False),
    _attention("SmolLM2", 2048, 9, 3, 64, FP32, causal=True),
    _attention("Llama-8B", 4096, 32, 8, 128, BF16, causal=True),
    _attention("Llama-8B", 4096, 32, 8, 128, BF16, causal=True, lse=False),
    _attention("Llama-8B", 4096, 32, 8, 128, FP32, causal=True),
    _attention("Mistral", 4096, 32, 8, 128, BF16, causal=True, window=1024),
    _attention("Mistral", 4096, 32, 8, 128, BF16, causal=True, window=1024, lse=False),
    _attention("T5", 512, 12, 12, 64, BF16, bias=True),
    _attention("T5", 512, 12, 12, 64, BF16, bias=True, lse=False),
    _attention("T5-3B", 512, 32, 32, 128, BF16, bias=True, _dkdv=Expected("full", spills=BIASED)),
    _attention("MPT", 2048, 32, 32, 128, BF16, causal=True, alibi=True),
    _attention("Gemma-2", 2048, 8, 4, 256, BF16, causal=True, cap=50.0, _dkdv=Expected("small")),
    _decode("GPT-2", 12, 12, 64, FP16),
    _decode("SmolLM2", 9, 3, 64, BF16, batch=8, context=1024),
    _decode("SmolLM2", 9, 3, 64, FP32),
    _decode("Llama-8B", 32, 8, 128, BF16),
    _decode("Llama-8B", 32, 8, 128, BF16, cache=torch.int8),
    _decode("Llama-8B", 32, 8, 128, BF16, new=512),
    _decode("Llama-8B", 32, 8, 128, BF16, new=512, cache=torch.int8),
    _decode("SmolLM2", 9, 3, 64, BF16, new=512, cache=torch.int8),
    _rope("SmolLM2", 9, 3, 64),
    _rope("Llama-8B", 32, 8, 128),
    _rope("Llama-8B", 32, 8, 128, torch.int8),
    _activation("MiniLM", 1536, "gelu", False, BF16),
    _activation("GPT-2", 3072, "gelu_tanh", False, FP16),
    _activation("SmolLM2", 1536, "silu", True, BF16),
    _activation("Llama-8B", 14336, "silu", True, FP32),
    _loss("SmolLM2", 576, 49152, BF16),
    _loss("SmolLM2", 576, 49152, BF16, linear=True),
    _loss("GPT-2", 768, 50257, FP32),
    _quantized("SmolLM2", 576, 1536, "int8", 1),
    _quantized("SmolLM2", 1536, 576, "q8_0", 1),
    _quantized("Llama-8B", 4096, 4096, "q4_0", 1),
    _quantized("Llama-8B", 4096, 14336, "q4_1", 16, kind="silu"),
    _quantized("Llama-8B", 4096, 4096, "q4_0", 512),
    _quantized("SmolLM2", 576, 576, "q4_1", 1, FP32),
)
