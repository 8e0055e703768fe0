"""The Triton kernels compiled, on a GPU: forward and backward of every op in 16 bits against float64, by the
factor-2 rule, at the shapes of real models; in torch.compile and in a CUDA graph.

Cases named "small" are for compute-sanitizer, too (see `make gpu-check`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from close import assert_as_good_as_eager
from torch import Tensor

from minilm import ops
from minilm.ops.quantized import FORMATS, quantise

pytestmark = pytest.mark.gpu
GPU = "cuda"
HALVES = [torch.float16, torch.bfloat16]


class Case(NamedTuple):
    """An op at a shape."""

    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    """Of the random tensors it is called with, and differentiated by."""
    terms: float = 1.0
    """How much larger than the results the terms are that cancel in their sums."""


def random(seed: int, *shape: int) -> Tensor:
    """The same numbers on every device, with a mean that is not zero."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.25).to(GPU)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=GPU)


def norm(op: str, rows: int, channels: int) -> Case:
    add, rms = op.startswith("add"), "rms" in op
    shapes = ((rows, channels),) * (2 if add else 1) + ((channels,),) * (1 if rms else 2)
    return Case(lambda *t: getattr(ops, op)(*t, 1e-5), shapes)


def attention(
    lengths: list[int], heads: int, kv_heads: int, size: int, *, more_keys: int = 0, bias: bool = False,
    alibi: bool = False, **kind: Any,
) -> Case:  # fmt: skip
    """q, k and v side by side, as the fused projection leaves them, unless there are more keys."""
    k_lens = [n + more_keys if n else 0 for n in lengths]
    tokens, keys = sum(lengths), sum(k_lens)
    ends = cumulative(lengths), cumulative(k_lens), max(lengths), max(k_lens)

    def call(packed: Tensor, *rest: Tensor) -> Tensor:
        q, k, v = packed.split([heads, kv_heads, kv_heads], dim=1)
        options: dict[str, Any] = dict(kind)
        if bias:
            options["bias"] = rest[0]
        if alibi:
            options["alibi_slopes"] = torch.arange(1, heads + 1, device=GPU) / (8.0 * heads)
        return ops.attention(q[:tokens], k, v, *ends, scale=size**-0.5, **options)

    shapes = ((keys, heads + 2 * kv_heads, size), *([(heads, max(lengths), max(k_lens))] if bias else []))
    return Case(call, shapes, terms=8.0)


def rope(tokens: int, heads: int, kv_heads: int, size: int) -> Case:
    angle = 10 * random(9, tokens, size // 2)
    shapes = (tokens, heads, size), (tokens, kv_heads, size)
    return Case(lambda q, k: ops.rope(q, k, angle.cos(), angle.sin()), shapes)


def linear(rows: int, channels: int, out: int, activation: str) -> Case:
    return Case(partial(ops.linear, activation=activation), ((rows, channels), (out, channels), (out,)))


def loss(op: str, tokens: int, vocabulary: int, channels: int = 0) -> Case:
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[::5] = -100
    labels = labels.to(GPU)
    if op == "cross_entropy":
        return Case(lambda logits: ops.cross_entropy(logits, labels), ((tokens, vocabulary),))
    shapes = ((tokens, channels), (vocabulary, channels))
    return Case(lambda h, w: ops.linear_cross_entropy(h / 4, w / 4, labels), shapes)


MIXED = [128, 1, 77, 0, 250, 33]
CASES: dict[str, Callable[[], Case]] = {
    "layer_norm small": partial(norm, "layer_norm", 5, 384),
    "layer_norm, BERT": partial(norm, "layer_norm", 4099, 768),
    "add_layer_norm, MiniLM": partial(norm, "add_layer_norm", 4099, 384),
    "rms_norm, SmolLM2": partial(norm, "rms_norm", 2050, 576),
    "add_rms_norm, Llama": partial(norm, "add_rms_norm", 1030, 4096),
    "attention small": partial(attention, [5, 0, 17], 4, 4, 32, causal=False),
    "attention, MiniLM": partial(attention, MIXED, 12, 12, 32, causal=False),
    "attention, MiniLM, long": partial(attention, [512, 300, 77], 12, 12, 32, causal=False),
    "attention, BERT, short": partial(attention, [128, 100, 3], 12, 12, 64, causal=False),
    "attention, BERT": partial(attention, [512, 129, 1], 12, 12, 64, causal=False),
    "attention, SmolLM2, short": partial(attention, [128, 99], 9, 3, 64, causal=True),
    "attention, SmolLM2": partial(attention, [700, 99], 9, 3, 64, causal=True),
    "attention, Llama": partial(attention, [1100, 65], 32, 8, 128, causal=True),
    "attention, more keys": partial(attention, [100, 33], 8, 2, 64, more_keys=300, causal=True),
    "attention, Phi": partial(attention, [513], 8, 8, 80, causal=True),
    "attention, Mistral": partial(attention, [900, 300], 8, 2, 128, causal=True, window=256),
    "attention, ModernBERT": partial(attention, [900, 128], 12, 12, 64, causal=False, window=65),
    "attention, T5": partial(attention, [400, 400, 9], 8, 8, 64, causal=False, bias=True),
    "attention, MPT": partial(attention, [600, 31], 8, 8, 128, causal=True, alibi=True),
    "attention, Gemma 2": partial(attention, [300, 200], 8, 4, 256, causal=True, soft_cap=50.0),
    "rope small": partial(rope, 7, 4, 2, 32),
    "rope, Llama": partial(rope, 1030, 32, 8, 128),
    "linear small": partial(linear, 5, 64, 96, "gelu"),
    "linear, BERT": partial(linear, 2050, 768, 3072, "gelu"),
    "linear, GPT-2": partial(linear, 515, 768, 3072, "gelu_new"),
    "gated small": lambda: Case(partial(ops.gated, activation="silu"), ((5, 192),)),
    "gated, SmolLM2": lambda: Case(partial(ops.gated, activation="silu"), ((2050, 3072),)),
    "gated, Gemma": lambda: Case(partial(ops.gated, activation="gelu_pytorch_tanh"), ((515, 8192),)),
    "cross_entropy small": partial(loss, "cross_entropy", 6, 300),
    "cross_entropy, SmolLM2": partial(loss, "cross_entropy", 1027, 49152),
    "linear_cross_entropy small": partial(loss, "linear_cross_entropy", 6, 300, 64),
    "linear_cross_entropy, SmolLM2": partial(loss, "linear_cross_entropy", 1027, 49152, 576),
}  # fmt: skip


def run(case: Case, dtype: torch.dtype, of: torch.dtype, *backends: str) -> list[Tensor]:
    """Results and gradients in `dtype`, of numbers that `of` can hold."""
    leaves = [random(i, *shape).to(of).to(dtype).requires_grad_() for i, shape in enumerate(case.shapes)]
    with ops.backend(*backends):
        out = case.call(*leaves)
        outs = list(out) if isinstance(out, tuple) else [out]
        upstream = [random(100 + i, *o.shape).to(of).to(o.dtype) for i, o in enumerate(outs)]
        torch.autograd.backward(outs, upstream)
    return [*(o.detach() for o in outs), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    exact = run(case, torch.float64, dtype, "reference")
    eager = run(case, dtype, dtype, "reference")
    ours = run(case, dtype, dtype, "triton")
    for index, (a, b, e) in enumerate(zip(ours, eager, exact, strict=True)):
        floor = 2 * torch.finfo(dtype).eps * case.terms * max(1.0, float(e.abs().max()))
        assert_as_good_as_eager(a, b.to(a.dtype), e, floor=floor, what=f"result {index} of {name}")


# --- the cache, and quantised weights: forward only ---


def paged(contexts: list[int], new: int, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """A block table in disorder, the contexts, and the slots of the `new` last tokens of each sequence."""
    needed = [-(-n // page) for n in contexts]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
    slots = []
    for row, (count, length) in enumerate(zip(needed, contexts, strict=True)):
        own = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(own, dtype=torch.int32)
        slots += [own[t // page] * page + t % page for t in range(length - new, length)]
    lens = torch.tensor(contexts, dtype=torch.int32)
    return table.to(GPU), lens.to(GPU), torch.tensor(slots).to(GPU)


@pytest.mark.parametrize("cache", [None, torch.int8])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("contexts", "new", "heads", "kv_heads", "size"),
    [
        pytest.param([5, 40], 1, 4, 2, 64, id="small"),
        pytest.param([1, 700, 33, 8000], 1, 32, 8, 128, id="Llama, a step"),
        pytest.param([3000], 1, 9, 3, 64, id="SmolLM2, one long context"),
        pytest.param([300, 64], 64, 9, 3, 64, id="SmolLM2, a chunk of a prompt"),
        pytest.param([513, 200], 1, 12, 12, 64, id="GPT-2"),
    ],
)
def test_rope_append_and_paged_attention(
    contexts: list[int], new: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, cache: Any
) -> None:
    page = 16
    table, lens, slots = paged(contexts, new, page)
    tokens = len(contexts) * new
    pages = int(table.max()) + 1
    q, k, v = (random(i, tokens, n, size) for i, n in enumerate((heads, kv_heads, kv_heads)))
    angle = 10 * random(3, tokens, size // 2)
    ends = torch.arange(0, tokens + 1, new, dtype=torch.int32, device=GPU)
    past = [random(4 + i, pages, page, kv_heads, size).to(dtype) for i in range(2)]

    def step(kind: torch.dtype, backend: str) -> list[Tensor]:
        new_q, new_k, new_v = (x.to(dtype).to(kind) for x in (q, k, v))
        scales: list[Tensor] = []
        stores = [x.to(kind) for x in past]
        if cache is not None:
            quantised = [ops.reference.quantise(x) for x in past]
            stores, scales = ([pair[i].clone() for pair in quantised] for i in (0, 1))
        with ops.backend(backend):
            turned = ops.rope_append(new_q, new_k, new_v, angle.cos(), angle.sin(), *stores, slots, *scales)
            out = ops.paged_attention(
                turned[0], *stores, table, ends, lens, new, max(contexts), scale=size**-0.5,
                **dict(zip(("k_scales", "v_scales"), scales, strict=False)),
            )  # fmt: skip
        return [out, *turned]

    exact, eager, ours = step(torch.float64, "reference"), step(dtype, "reference"), step(dtype, "triton")
    # An int8 step of the new keys may fall to the other side where their 16 bits were rounded.
    steps = 1 / 127 if cache is not None else 0.0
    for name, a, b, e in zip(("attention", "q", "k"), ours, eager, exact, strict=True):
        floor = (4 * torch.finfo(dtype).eps + steps) * max(1.0, float(e.abs().max()))
        assert_as_good_as_eager(a, b, e, floor=floor, what=name)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 3, 16, 130])
@pytest.mark.parametrize("form", FORMATS)
def test_quantized_linear(form: str, rows: int, dtype: torch.dtype) -> None:
    weight = quantise(random(0, 1536, 576).cpu() / 8, form)
    weight = weight._replace(**{name: plane.to(GPU) for name, plane in weight.planes.items()})
    x, bias = random(1, rows, 576).to(dtype), random(2, 1536).to(dtype)

    def call(kind: torch.dtype, backend: str) -> Tensor:
        with ops.backend(backend), torch.no_grad():
            return ops.quantized_linear(x.to(kind), weight, bias.to(kind), "gelu")

    exact, eager, ours = call(torch.float64, "reference"), call(dtype, "reference"), call(dtype, "triton")
    floor = 2 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert_as_good_as_eager(ours, eager, exact, floor=floor)


# --- models ---


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mistral", "qwen3"])
def test_whole_models(family: str, dtype: torch.dtype) -> None:
    """Through the automatic choice, which is Triton wherever the extension has no kernel."""
    from pairs import model_of
    from strategies import small

    model = model_of(small(family), 0).to(GPU)
    mask = (torch.arange(9) < torch.tensor([[9], [1], [5]])).long().to(GPU)
    ids = torch.randint(4, 41, (3, 9), generator=torch.Generator().manual_seed(0)).to(GPU) * mask
    model = model.to(dtype)
    ops.explain(reset=True)
    with torch.no_grad():
        ours = model(ids, mask).logits
        ran = ops.explain().backends("attention")
        with ops.backend("reference"):
            eager = model(ids, mask).logits
            exact = copy.deepcopy(model).double()(ids, mask).logits
    assert ran <= {"triton", "native"}, ran
    real = mask.bool()
    floor = 8 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert_as_good_as_eager(ours[real], eager[real], exact[real], floor=floor)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_torch_compile_takes_a_model_whole(family: str) -> None:
    """One graph with the kernels in it, forward and backward, by the inductor."""
    from pairs import model_of
    from strategies import small

    from minilm.model.batch import pack

    model = model_of(small(family), 0).to(GPU)
    mask = (torch.arange(9) < torch.tensor([[9], [1], [5]])).to(GPU)
    ids = torch.randint(4, 41, (3, 9), generator=torch.Generator().manual_seed(0)).to(GPU)
    packed = pack(3, 9, mask, model.device)
    tokens = packed.pack(ids)
    weights = [p for p in model.body.parameters() if p.requires_grad]
    found = []
    with ops.backend("triton", "reference"):
        for call in (model.run_packed, torch.compile(model.run_packed, fullgraph=True)):
            out = call(tokens, packed)
            gradients = torch.autograd.grad(out.square().sum(), weights, allow_unused=True)
            found.append([out, *(g for g in gradients if g is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * max(1.0, float(one.abs().max())))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_decode_step_is_captured_in_a_graph(dtype: torch.dtype) -> None:
    """Norm, projection, rope and append, attention over the cache, projection: replayed on other numbers."""
    heads, kv_heads, size, contexts, page = 9, 3, 64, [700, 33], 16
    table, lens, slots = paged(contexts, 1, page)
    stores = [random(i, int(table.max()) + 1, page, kv_heads, size).to(dtype) for i in range(2)]
    channels = heads * size
    w, into, out_of = (
        (random(2, channels) / 8).to(dtype),
        (random(3, (heads + 2 * kv_heads) * size, channels) / 24).to(dtype),
        (random(4, channels, channels) / 24).to(dtype),
    )
    angle, ends = random(5, 2, size // 2), torch.arange(3, dtype=torch.int32, device=GPU)

    def step(x: Tensor) -> Tensor:
        qkv = ops.linear(ops.rms_norm(x, w, 1e-5), into).view(2, heads + 2 * kv_heads, size)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        q, _ = ops.rope_append(q, k, v, angle.cos(), angle.sin(), *stores, slots)
        out = ops.paged_attention(q, *stores, table, ends, lens, 1, max(contexts), scale=size**-0.5)
        return x + ops.linear(out.flatten(1), out_of)

    x = random(6, 2, channels).to(dtype)
    with torch.no_grad(), ops.backend("triton", "reference"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(x)
        x.copy_(random(7, 2, channels))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, step(x))
