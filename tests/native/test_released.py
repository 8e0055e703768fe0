"""The planes of quantised layers that the native kernels have packed: dropped, unless somebody else holds
them, and there again, bit for bit, for whatever asks."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fused_models import WIDE, batch, model_of, quantise_blocks, quantised_linear
from native_runs import OTHER_ISAS, guarded, passes_with, require_extension
from torch import Tensor, nn

from minilm import ops
from minilm.native import released
from minilm.ops.backends import packed
from minilm.ops.quantized import QuantizedWeight, empty, quantise
from minilm.quantized import QuantizedEmbedding, QuantizedLinear

FORMATS = ("int8", "q8_0", "q4_0", "q4_1")
LENGTHS = [5, 1, 3]


@pytest.fixture(autouse=True)
def _extension_is_there() -> None:
    require_extension()


def bits(tensor: Tensor) -> bytes:
    """Of a copy: NumPy's view of a plane would keep it."""
    return tensor.detach().clone().contiguous().view(torch.uint8).numpy().tobytes()


def random_planes(format: str, rows: int, columns: int) -> QuantizedWeight:
    """Every code there is; scales of both signs, with the smallest and largest numbers among them."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = empty(format, rows, columns)
    codes = torch.randint(0, 256, weight.codes.shape, generator=generator, dtype=torch.uint8)
    weight.codes.copy_(codes.view(weight.codes.dtype))
    for plane in (weight.scale, weight.minimum):
        if plane is not None:
            plane.copy_(torch.randn(plane.shape, generator=generator))
            ends = torch.finfo(plane.dtype)
            special = torch.tensor([0.0, -0.0, ends.max, ends.min, ends.tiny, ends.smallest_normal / 4])
            plane.view(-1)[: len(special)] = special.to(plane.dtype)[: plane.numel()]
    return weight


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (37, 96), (64, 64), (70, 224)])
@pytest.mark.parametrize("gated", [False, True])
def test_unpacking_is_the_inverse_of_packing(format: str, rows: int, columns: int, gated: bool) -> None:
    rows *= 1 + gated
    weight = random_planes(format, rows, columns)
    if format == "q4_0":  # its minimum, -8 scale, is packed too, and is not needed
        weight.scale[weight.scale.abs() > 8000] = 1.0
    made = packed.pack(weight, torch.randn(rows), gated=gated)
    shape, size = packed.shape_of(weight, gated=gated)
    assert (shape[1:], size) == (made[1:], made.data.numel())
    found = packed.unpack(made, format, rows, columns)
    assert found.planes.keys() == weight.planes.keys()
    for name, plane in weight.planes.items():
        assert bits(found.planes[name]) == bits(plane), name
        assert found.planes[name].dtype == plane.dtype


@pytest.mark.parametrize("columns", [1, 3, 33, 191, 193, 385])
def test_unpacking_columns_of_any_number(columns: int) -> None:
    weight = random_planes("int8", 21, columns)
    found = packed.unpack(packed.pack(weight, None), "int8", 21, columns)
    assert bits(found.codes) == bits(weight.codes)
    assert bits(found.scale) == bits(weight.scale)


@pytest.mark.parametrize("format", FORMATS)
def test_unpacking_reads_and_writes_nothing_beyond(format: str) -> None:
    weight = random_planes(format, 37, 96)
    made = packed.pack(weight, None)
    with guarded(made.data.numel()) as data, guarded(weight.codes.nbytes) as codes:
        data.copy_(made.data)
        to = codes.view(weight.codes.dtype).view(weight.codes.shape)
        scale = torch.empty_like(weight.scale)
        minimum = None if weight.minimum is None else torch.empty_like(weight.minimum)
        order = packed.places(37, False)
        torch.ops.minilm.unpack_linear.default(data, order, made.format, 96, to, scale, minimum)
        assert bits(to) == bits(weight.codes)


def test_the_op_refuses_what_does_not_fit() -> None:
    weight = random_planes("q8_0", 37, 96)
    made, order = packed.pack(weight, None), packed.places(37, False)
    right = [made.data, order, 4, 96, torch.empty(37, 96, dtype=torch.int8), weight.scale.clone(), None]
    torch.ops.minilm.unpack_linear.default(*right)
    missing = order.clone()
    missing[36] = -1
    for place, value, message in (
        (0, made.data[:-1], "packed was not made for"),
        (1, missing, "every row"),
        (1, order + 1, "rows of the weight"),
        (1, order[:-1], "whole panels"),
        (2, 0, "must be quantised"),
        (2, 6, "unknown weight format"),
        (3, 97, "multiple of 32"),
        (4, torch.empty(37, 96, dtype=torch.uint8), "codes must be"),
        (5, weight.scale[:-1].clone(), "scale must be"),
        (6, weight.scale.clone(), "minimum must be"),
    ):
        wrong = [*right[:place], value, *right[place + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            torch.ops.minilm.unpack_linear.default(*wrong)


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_other_instruction_sets(isa: str) -> None:
    passes_with(isa, __file__, chosen="unpacking or asks_for")


# Release


def model(format: str = "q4_1", family: str = "llama") -> Any:
    sizes = WIDE if family == "llama" else {"hidden_size": 64, "intermediate_size": 96}
    found = model_of(family, **sizes)
    quantise_blocks(found, format)
    return found


def run(model: Any, backend: str = "native") -> Tensor:
    with torch.no_grad(), ops.backend(backend):
        hidden: Tensor = model.run_packed(*batch(LENGTHS))
    return hidden


def planes_of(model: Any) -> dict[str, bytes]:
    return {name: bits(plane) for name, plane in model.state_dict().items()}


def count(model: Any) -> int:
    return sum(released.form_of(module) is not None for module in model.modules())


def layer(model: Any) -> Any:
    return model.body.layers[1].mlp.up


def of_state_dict(found: Any, name: str) -> Any:
    return found.state_dict().get(f"body.layers.1.mlp.up.{name}")


def of_pickle(found: Any, name: str) -> Any:
    return getattr(layer(pickle.loads(pickle.dumps(found))), name)


def of_file(found: Any, name: str) -> Any:
    buffer = io.BytesIO()
    torch.save(found, buffer)
    buffer.seek(0)
    return getattr(layer(torch.load(buffer, weights_only=False)), name)


def of_functional_call(found: Any, name: str) -> Any:
    with torch.no_grad():
        torch.func.functional_call(layer(found), {name: getattr(layer(found), name)}, (torch.zeros(1, 64),))
    return getattr(layer(found), name)


ASKS: dict[str, Callable[[Any, str], Any]] = {
    "attribute": lambda found, name: getattr(layer(found), name),
    "quantized": lambda found, name: getattr(layer(found).quantized, name),
    "_buffers": lambda found, name: layer(found)._buffers[name],
    "get_buffer": lambda found, name: found.get_buffer(f"body.layers.1.mlp.up.{name}"),
    "state_dict": of_state_dict,
    "named_buffers": lambda found, name: dict(found.named_buffers()).get(f"body.layers.1.mlp.up.{name}"),
    "deepcopy": lambda found, name: getattr(layer(copy.deepcopy(found)), name),
    "copy": lambda found, name: getattr(copy.copy(layer(found)), name),
    "pickle": of_pickle,
    "file": of_file,
    "to": lambda found, name: getattr(layer(found.to(torch.bfloat16)), name),
    "functional_call": of_functional_call,
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("asks", ASKS)
def test_who_asks_for_planes_gets_them(asks: str, format: str) -> None:
    found = model(format)
    before, names = planes_of(found), list(found.state_dict())
    whole = run(found)
    assert count(found) == 4 * len(found.body.layers)
    assert isinstance(layer(found), QuantizedLinear)
    assert type(layer(found)).__name__ == "QuantizedLinear"
    shown = repr(found)
    assert torch.equal(run(found), whole)
    assert count(found) == 4 * len(found.body.layers), "neither a pass nor repr asks"
    for name in ("codes", "scale", "minimum"):
        plane = ASKS[asks](found, name)
        key = f"body.layers.1.mlp.up.{name}"
        assert (plane is None) == (key not in before)
        assert plane is None or bits(plane) == before[key]
    assert type(layer(found)) is QuantizedLinear
    if asks != "to":
        assert planes_of(found) == before
        assert torch.equal(run(found), whole)
    assert list(found.state_dict()) == names
    assert repr(found) == shown
    assert count(found) == 0, "what was asked for stays"


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_modules_that_run_one_by_one_ask_unless_they_can_run_as_packed(family: str) -> None:
    for change in ("hook", "backend", "hidden_states"):
        found = model("q8_0", family)
        by_reference, whole = run(copy.deepcopy(found), "reference"), run(found)
        assert count(found) > 0
        if change == "hook":
            called: list[Any] = []

            def note(*arguments: Any, called: list[Any] = called) -> None:
                called.append(arguments)

            layer(found).register_forward_hook(note)
            with torch.no_grad():
                result = found.run_packed(*batch(LENGTHS))
            assert called
        elif change == "backend":
            result = run(found, "reference")
            assert torch.equal(result, by_reference)
        else:
            ids = batch([6])[0].view(1, -1)
            with torch.no_grad():
                assert found(ids, output_hidden_states=True).hidden_states is not None
            result = run(found)
        # A bias may have been written to: a layer that has one asks.
        asked = change == "backend" or family == "bert"
        assert count(found) == (0 if asked else 4 * len(found.body.layers))
        assert (result - whole).norm() < 0.05 * whole.norm()


def test_a_layer_by_itself_runs_as_packed() -> None:
    for format in FORMATS:
        found = model(format)
        x = torch.randn(5, 64)
        with torch.no_grad():
            before = layer(found)(x, "silu")
        run(found)
        ops.explain(reset=True)
        with torch.no_grad():
            assert torch.equal(layer(found)(x, "silu"), before)
        assert ops.explain().backends("quantized_linear") == {"native"}
        assert released.form_of(layer(found)) is not None
        assert layer(found)(x.requires_grad_(), "silu").requires_grad, "a call with gradients asks"
        assert released.form_of(layer(found)) is None
        with pytest.raises(ValueError, match=r"must end in 64"):
            layer(found)(torch.randn(5, 63))


# The output matrix, which is the token table of a tied model


def decoder(format: str, *, tied: bool) -> Any:
    found = model_of("llama", **WIDE, tie_word_embeddings=tied, vocab_size=77)
    quantise_blocks(found, "q4_1")
    table = found.body.embeddings.tokens
    found.body.embeddings.tokens = QuantizedEmbedding(quantise(table.weight, format), torch.float32)
    if not tied:
        found.head.decoder = quantised_linear(found.head.decoder, format)
    return found


def output_layer(found: Any) -> Any:
    return found.body.embeddings.tokens if found.head.decoder is None else found.head.decoder


PROMPT = torch.tensor([[5, 76, 3, 41, 8]])


def written(found: Any, backend: str = "native") -> tuple[list[int], Tensor]:
    """Greedy tokens, and the logits of the prompt."""
    with torch.inference_mode(), ops.backend(backend):
        tokens = found.generate(PROMPT, max_new_tokens=9, do_sample=False)
        logits: Tensor = found(PROMPT).logits
    return tokens[0].tolist(), logits.clone()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_output_matrix_is_held_once(format: str, tied: bool) -> None:
    found = decoder(format, tied=tied)
    held = decoder(format, tied=tied)
    planes = output_layer(held).quantized  # stay, since somebody holds them
    by_reference = written(decoder(format, tied=tied), "reference")
    before = planes_of(decoder(format, tied=tied))
    text, logits = written(found)
    assert released.form_of(output_layer(found)) is not None
    assert type(output_layer(found)).__name__ == ("QuantizedEmbedding" if tied else "QuantizedLinear")
    ops.explain(reset=True)
    assert written(found)[0] == text
    assert torch.equal(written(found)[1], logits)
    assert ops.explain().backends("embed") == ops.explain().backends("decode_step") == {"native"}
    assert ops.explain().backends("quantized_linear") == {"native"}
    assert released.form_of(output_layer(found)) is not None, "neither prompts nor steps ask"
    assert written(held)[0] == text
    assert torch.equal(written(held)[1], logits)
    assert released.form_of(output_layer(held)) is None
    assert (logits - by_reference[1]).norm() < 0.05 * logits.norm()
    assert planes_of(found) == before
    assert released.form_of(output_layer(found)) is None
    assert written(found)[0] == text
    assert torch.equal(written(found)[1], logits)
    del planes


def test_writes_to_an_output_matrix_that_came_back_are_seen() -> None:
    found, twin = decoder("q8_0", tied=True), decoder("q8_0", tied=True)
    written(found)
    assert released.form_of(output_layer(found)) is not None
    for each in (found, twin):
        output_layer(each).codes.data.copy_(output_layer(each).codes.flip(0))
    assert written(found)[0] == written(twin)[0]
    assert torch.equal(written(found)[1], written(twin)[1])


def test_modules_that_look_up_tokens_ask() -> None:
    found = decoder("q8_0", tied=True)
    text, _ = written(found)
    rows = torch.tensor([[0, 76], [5, 5]])
    expected = decoder("q8_0", tied=True).body.embeddings.tokens(rows)
    assert torch.equal(output_layer(found)(rows), expected)
    assert released.form_of(output_layer(found)) is None
    assert written(found)[0] == text


def test_loading_and_setting_planes() -> None:
    found, other = model(), model()
    with torch.no_grad():
        for plane in other.buffers():
            plane.copy_(plane.flip(0))
    run(found)
    assert count(found) > 0
    found.load_state_dict(other.state_dict())
    assert planes_of(found) == planes_of(other)
    assert torch.equal(run(found), run(other))
    found = model()
    run(found)
    new = layer(other).codes.flip(0).contiguous()
    layer(found).codes = new
    assert layer(found).codes is new
    layer(other).codes = new.clone()
    for block, twin in zip(found.body.layers, other.body.layers, strict=True):
        for own, others in ((block.mlp, twin.mlp), (block.attention, twin.attention)):
            own.load_state_dict(others.state_dict())
    torch.testing.assert_close(run(found), run(found, "reference"), atol=0.2, rtol=0.2)
    with pytest.raises(RuntimeError, match=r"a QuantizedLinear \(q4_1\) cannot be trained"):
        layer(found).train()


# Holders


def memory_view(plane: Tensor) -> Any:
    return memoryview(plane.numpy())


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "reference": lambda found: layer(found).scale,
    "matrix": lambda found: layer(found).quantized,
    "state_dict": lambda found: found.state_dict(),
    "dict": lambda found: layer(found)._buffers,
    "copy": lambda found: copy.copy(layer(found)),
    "detached": lambda found: layer(found).scale.detach(),
    "view": lambda found: layer(found).scale[1:],
    "array": lambda found: layer(found).scale.numpy(),
    "memoryview": lambda found: memory_view(layer(found).scale),
    "storage": lambda found: layer(found).scale.untyped_storage(),
    "set": lambda found: torch.empty(0, dtype=torch.float16).set_(layer(found).scale.untyped_storage()),
    "capsule": lambda found: torch.utils.dlpack.to_dlpack(layer(found).scale),
    "imported": lambda found: torch.from_dlpack(layer(found).scale),
    "iterator": lambda found: iter([layer(found).scale]),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_planes_that_somebody_holds_stay(holder: str) -> None:
    found = model()
    held = HOLDERS[holder](found)
    run(found)
    assert type(layer(found)) is QuantizedLinear
    if holder != "state_dict":
        assert count(found) == 4 * len(found.body.layers) - 1
    before = run(found)
    scale = layer(found).scale
    scale.data.mul_(2)
    after = run(found)
    assert not torch.equal(after, before)
    assert (after - run(found, "reference")).norm() < 0.05 * after.norm()
    del held


def test_an_array_from_before_writes_through() -> None:
    found = model()
    array = layer(found).scale.numpy()
    before = run(found)
    array *= np.float16(2)
    after = run(found)
    assert not torch.equal(after, before)
    assert (after - run(found, "reference")).norm() < 0.05 * after.norm()


def test_layers_that_share_planes_keep_them() -> None:
    found = model()
    first, second = found.body.layers[0].mlp, found.body.layers[1].mlp
    second.down = QuantizedLinear(first.down.quantized)
    run(found)
    assert type(first.down) is type(second.down) is QuantizedLinear
    assert first.down.codes is second.down.codes
    assert count(found) == 4 * len(found.body.layers) - 2
    second.up = first.up
    assert torch.equal(run(found), run(copy.deepcopy(found)))


def test_planes_of_one_memory_or_with_nan_stay() -> None:
    found = model("q8_0")
    matrix = layer(found).quantized
    both = torch.empty(2, *matrix.scale.shape, dtype=torch.float16)
    both[0] = matrix.scale
    layer(found).scale = both[0]
    del both, matrix
    nan = found.body.layers[0].mlp.down
    nan.scale.data[0, 0] = float("nan")
    run(found)
    assert type(layer(found)) is type(nan) is QuantizedLinear
    assert count(found) == 4 * len(found.body.layers) - 2


# Afterwards


def test_writes_to_planes_that_came_back_are_seen() -> None:
    for name in ("codes", "scale", "minimum"):
        found = model()
        before = run(found)
        getattr(layer(found), name).data.mul_(2)
        after = run(found)
        assert not torch.equal(after, before)
        assert (after - run(found, "reference")).norm() < 0.05 * after.norm()
        getattr(layer(found), name).data.numpy()[:] = 1
        again = run(found)
        assert not torch.equal(again, after)
        assert (again - run(found, "reference")).norm() < 0.05 * again.norm()


def test_writes_to_what_stays_are_seen_while_planes_are_released() -> None:
    found = model("int8", "bert")
    before = run(found)
    assert count(found) > 0
    for write in (
        lambda: layer(found).bias.data.add_(1),
        lambda: found.body.layers[0].mlp_norm.weight.data.mul_(1.5),
    ):
        write()
        after = run(found)
        assert not torch.equal(after, before)
        assert (after - run(copy.deepcopy(found), "reference")).norm() < 0.05 * after.norm()
        before = after
    assert torch.equal(run(found), before)


def test_a_new_layer_packs_again_and_releases_again() -> None:
    found = model()
    run(found)
    weight = quantise(torch.randn(layer(found).out_features, 64), "q4_1")
    found.body.layers[0].mlp.up = QuantizedLinear(QuantizedWeight("q4_1", *map(torch.clone, weight[1:])))
    after = run(found)
    assert count(found) == 4 * len(found.body.layers)
    assert (after - run(copy.deepcopy(found), "reference")).norm() < 0.05 * after.norm()


def test_the_memory_is_that_of_the_packed_form_alone() -> None:
    found = model("q8_0")
    big = QuantizedLinear(quantise(torch.randn(96, 64), "q8_0"))
    assert not released.release(nn.Linear(2, 2), packed.pack(big.quantized, None))
    run(found)
    gc.collect()
    shapes = {(96, 64), (64, 96)}
    left = [t for t in gc.get_objects() if type(t) is Tensor and t.dtype == torch.int8 and t.shape in shapes]
    assert [t for t in left if t is not big.codes] == []


def test_threads_that_ask_at_once_get_the_same() -> None:
    for _ in range(5):
        found = model()
        before = planes_of(copy.deepcopy(found))
        expected = run(copy.deepcopy(found))
        barrier, wrong = threading.Barrier(4), []

        def work(
            number: int, found: Any = found, before: Any = before, expected: Any = expected,
            barrier: Any = barrier, wrong: Any = wrong,
        ) -> None:  # fmt: skip
            try:
                barrier.wait()
                for _ in range(4):
                    same = torch.equal(run(found), expected) if number % 2 else planes_of(found) == before
                    if not same:
                        wrong.append("another result")
            except Exception as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
