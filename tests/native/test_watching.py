"""What happens to a model between two calls is seen by the next: writes of every kind, settings, code, hooks;
by whole passes, by single layers, by steps of decoding. Copies carry no packed weights, and there is one of
them; threads that come at once make it once."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fused_models import WIDE, batch, ints, model_of, quantise_blocks
from hypothesis import given
from hypothesis import strategies as st
from native_runs import examples, require_extension
from torch import Tensor, nn

from minilm import ops
from minilm.generation.engine import Engine, Request
from minilm.generation.sampling import Sampling
from minilm.model import layers
from minilm.native import blocks as fused
from minilm.native import steps as decode_step
from minilm.native.state import made_of
from minilm.ops.backends import packed, watch
from minilm.ops.quantized import quantise
from minilm.quantized import QuantizedEmbedding

LENGTHS = [5, 1, 3]


@pytest.fixture(autouse=True)
def _extension_is_there() -> None:
    require_extension()


def run(model: Any, backend: str | None = "native") -> Tensor:
    with torch.no_grad(), ops.backend(backend or "auto"):
        hidden: Tensor = model.run_packed(*batch(LENGTHS))
    return hidden


def logits(model: Any, backend: str | None = "native") -> Tensor:
    """Of one step of decoding, after a prompt that the same backend has read."""
    cache = model.new_cache(2)
    tokens, found = batch([5, 3])
    with torch.no_grad(), ops.backend(backend or "auto"):
        model.run_packed(tokens, found, cache=cache, rows=cache.rows)
        scores: Tensor = model.step(ints(4, 5, dtype=torch.int64), cache.rows, cache)[0]
    return scores


def assert_current(model: Any, before: Tensor, call: Callable[..., Tensor]) -> None:
    """The results are those of the weights that the model has now, and not the ones before."""
    found, expected = call(model), call(model, "reference")
    assert not torch.allclose(found, before, atol=1e-5, rtol=0), "the change was not seen"
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


# Writes


def by_data(p: Tensor) -> None:
    p.data.mul_(1.5)


def by_view_of_data(p: Tensor) -> None:
    p.data.view(-1)[: max(1, p.numel() // 2)].add_(0.7)


def by_copy(p: Tensor) -> None:
    p.data.copy_(p.data * 0.5 + 0.1)


def by_foreach(p: Tensor) -> None:
    torch._foreach_mul_([p.data], 1.5)


def by_numpy(p: Tensor) -> None:
    array = p.detach().numpy()
    array *= 1.5


def by_data_again(p: Tensor) -> None:
    p.data = p.data * 1.5


def by_index(p: Tensor) -> None:
    p.data[..., :1] = 0.9


def by_storage(p: Tensor) -> None:
    part = torch.empty(0, dtype=p.dtype).set_(p.untyped_storage())
    with torch.no_grad():
        part.mul_(1.5)


WRITES = [by_data, by_view_of_data, by_copy, by_foreach, by_numpy, by_data_again, by_index, by_storage]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_writes_that_no_version_counts_are_seen(family: str, write: Callable[[Tensor], None]) -> None:
    """In each matrix, bias, norm and table, one after the other, each time after it was packed anew."""
    model = model_of(family, num_hidden_layers=1) if family == "bert" else model_of(family, n_layer=1)
    call = run if family == "bert" else logits
    names = [name for name, _ in model.named_parameters() if name.startswith("body.")]
    for name in names if write in (by_data, by_numpy) else names[::3]:
        before = call(model)
        write(model.get_parameter(name))
        found, expected = call(model), call(model, "reference")
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
        # The bias of keys changes no score, and the last norm's input none of it.
        assert "qkv.bias" in name or not torch.equal(found, before), name


def test_a_numpy_view_from_before_the_first_run_is_seen_each_time() -> None:
    model = model_of("llama", tie_word_embeddings=False)
    for name in ("body.layers.0.mlp.up.weight", "head.decoder.weight", "body.norm.weight"):
        array = model.get_parameter(name).numpy()
        for _ in range(3):
            before = logits(model)
            array *= 1.3
            assert_current(model, before, logits)
            assert torch.equal(logits(model), logits(model))


def test_a_model_made_of_arrays_is_seen() -> None:
    model = model_of("bert")
    arrays = {}
    for name, p in list(model.named_parameters()):
        arrays[name] = p.detach().numpy().copy()
        owner, _, leaf = name.rpartition(".")
        made = nn.Parameter(torch.from_numpy(arrays[name]), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, made)
    before = run(model)
    arrays["body.layers.1.mlp.down.weight"][:] *= -1
    assert_current(model, before, run)


def test_memory_shared_with_processes_is_seen() -> None:
    model = model_of("bert").share_memory()
    before = run(model)
    model.body.layers[0].attention.out.weight.data.mul_(3)
    assert_current(model, before, run)


@pytest.mark.parametrize("plane", ["codes", "scale", "minimum"])
def test_planes_of_quantised_layers_are_seen(plane: str) -> None:
    model = model_of("llama", **WIDE, tie_word_embeddings=False)
    quantise_blocks(model, "q4_1")
    table = model.body.embeddings.tokens
    model.body.embeddings.tokens = QuantizedEmbedding(quantise(table.weight, "q4_1"), torch.float32)
    for place in ("body.layers.1.mlp.down", "body.layers.0.attention.qkv", "body.embeddings.tokens"):
        for write in (lambda t: t.data.zero_(), lambda t: t.data.numpy().fill(1)):
            before = logits(model)
            write(getattr(model.get_submodule(place), plane))
            found = logits(model)
            assert not torch.equal(found, before)
            assert (found - logits(model, "reference")).norm() < 0.05 * found.norm()


@examples(20)
@given(
    st.lists(st.tuples(st.sampled_from(WRITES), st.integers(0, 200), st.booleans()), min_size=1, max_size=4)
)
def test_any_order_of_writes_and_calls_is_seen(changes: list[tuple[Any, int, bool]]) -> None:
    """Whole passes and single layers look at the same weights: what one has seen the other sees, too."""
    model = model_of("bert", num_hidden_layers=1)
    run(model)
    names = [name for name, _ in model.named_parameters() if "layers" in name]
    for write, place, by_layers in changes:
        write(model.get_parameter(names[place % len(names)]))
        whole = {"blocks": "torch"} if by_layers else {}
        with torch.no_grad(), ops.backend("native", "torch", **whole):
            found = model.run_packed(*batch(LENGTHS))
        torch.testing.assert_close(found, run(model, "reference"), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(run(model), run(model, "reference"), atol=2e-3, rtol=2e-3)


def test_a_paused_text_goes_on_with_the_weights_of_now() -> None:
    """The head and the blocks of a step are of one time."""
    model = model_of("llama", tie_word_embeddings=False)
    cache = model.new_cache(1)
    twin = model.new_cache(1)
    for kept, backend in ((cache, "native"), (twin, "reference")):
        tokens, found = batch([5])
        with torch.no_grad(), ops.backend(backend):
            model.run_packed(tokens, found, cache=kept, rows=kept.rows)
            model.step(ints(4, dtype=torch.int64), kept.rows, kept)
    for name in ("body.layers.1.mlp.up.weight", "head.decoder.weight", "body.embeddings.tokens.weight"):
        model.get_parameter(name).data.mul_(-1.5)
        with torch.no_grad():
            with ops.backend("native"):
                found = model.step(ints(7, dtype=torch.int64), cache.rows, cache)[0]
            with ops.backend("reference"):
                expected = model.step(ints(7, dtype=torch.int64), twin.rows, twin)[0]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("told", [False, True], ids=["seen", "said"])
def test_a_text_that_is_being_written_sees_new_weights_within_eight_tokens(told: bool) -> None:
    """An engine does not look at the model in each step; `weights_changed` counts in the next."""
    model = model_of("llama", tie_word_embeddings=False)
    engine = Engine(model)
    engine.add(Request([1, 2, 3], Sampling(), 40))
    seen: list[bool] = []
    with ops.backend("native"):
        for _ in range(4):
            engine.step()
        for _ in range(20):
            model.head.decoder.weight.data.mul_(-1)
            before = made_of(model).ends
            told and model.weights_changed()
            engine.step()
            seen.append(made_of(model).ends is not before)
    first = seen.index(True)
    assert first < (1 if told else 8)
    assert all(seen[first:]), "once something was written, each step looks until one finds nothing"


def test_what_cannot_be_seen_can_be_said() -> None:
    model = model_of("bert")
    weight = model.body.layers[0].mlp.down.weight
    array = np.from_dlpack(weight.detach())
    array.flags.writeable or pytest.skip("NumPy may not write to it")
    before = run(model)
    array *= 2
    model.weights_changed()
    assert_current(model, before, run)


def test_nothing_is_copied_or_moved_by_being_watched() -> None:
    tensor = torch.arange(64.0)
    address, array = tensor.data_ptr(), None
    seen = watch.Watch([tensor])
    assert seen.holds([tensor])
    assert float(tensor.sum()) == 2016
    assert seen.holds([tensor]), "reading is no writing"
    tensor.data.add_(1)
    assert not seen.holds([tensor])
    assert tensor.data_ptr() == address
    again = watch.Watch([tensor])
    assert again.holds([tensor])
    assert not seen.holds([tensor]), "the mark is of the newer watch"
    array = tensor.numpy()
    other = watch.Watch([tensor])
    array[3] = 7
    assert not other.holds([tensor])
    assert float(tensor[3]) == 7


def test_without_the_marks_of_pytorch_copies_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_can_mark", False)
    model = model_of("bert")
    before = run(model)
    assert torch.equal(run(model), before)
    model.body.layers[1].mlp.up.weight.data[3, 2] += 5
    assert_current(model, before, run)
    nan = torch.tensor([1.0, float("nan")])
    assert watch.Watch([nan]).holds([nan])


# Single layers


@pytest.mark.slow
def test_a_new_bias_at_the_old_address_is_not_taken_for_it() -> None:
    layer, x = layers.Linear(8, 8), torch.randn(3, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(8))
        for value in range(20):
            layer.bias = None
            gc.collect()
            layer.bias = nn.Parameter(torch.full((8,), float(value)))
            with ops.backend("native"):
                torch.testing.assert_close(layer(x), x + value)


def test_what_is_kept_keeps_nothing_alive() -> None:
    layer = layers.Linear(8, 8)
    with torch.no_grad():
        layer.weight.zero_()
        with ops.backend("native"):
            layer(torch.ones(1, 8))
    freed: list[int] = []
    weakref.finalize(layer.bias, freed.append, 1)
    layer.bias = None
    gc.collect()
    assert freed


# Settings, code, hooks


def refused(model: Any) -> str:
    """Why the whole pass did not run; the result is that of the modules."""
    ops.explain(reset=True)
    found = run(model, None)
    (decision,) = (d for d in ops.explain().decisions if d.op == "blocks" and d.calls)
    torch.testing.assert_close(found, run(model, "reference"), atol=2e-3, rtol=2e-3)
    return str(decision.refused.get("native", ""))


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("layers.1.attention", "scale", 0.9),
        ("layers.0.attention", "window", 2),
        ("layers.1.attention_norm", "eps", 0.5),
        ("layers.0.mlp_norm", "eps", 0.5),
        ("norm", "eps", 0.5),
        ("layers.1.mlp", "activation", "relu"),
        ("layers.0.mlp", "forward", lambda x: x * 2),
        ("layers.1.mlp.up", "forward", lambda x, activation=None: x.new_ones(len(x), 154)),
        ("layers.1.attention.qkv", "forward", lambda x, activation=None: x.new_ones(len(x), 200)),
        ("layers.0.attention_norm", "forward", lambda x, delta=None: (x, x)),
        ("layers.1", "forward", lambda x, delta, batch: (x, delta)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_settings_and_methods_of_one_module_count(place: str, name: str, value: Any) -> None:
    model = model_of("llama")
    before, step = run(model), logits(model)
    owner = model.body.get_submodule(place)
    own = vars(owner).get(name)
    setattr(owner, name, value)
    assert not torch.allclose(run(model, None), before, atol=1e-5)
    assert bool(refused(model)) == (name not in ("scale", "window"))
    torch.testing.assert_close(logits(model, None), logits(model, "reference"), atol=2e-3, rtol=2e-3)
    if own is None and name == "forward":
        delattr(owner, name)
    else:
        setattr(owner, name, own)
    assert refused(model) == ""
    assert torch.equal(run(model), before)
    assert torch.equal(logits(model), step)


def test_the_same_setting_everywhere_is_taken() -> None:
    model = model_of("llama")
    before = run(model)
    for module in model.body.modules():
        if isinstance(module, layers.Norm):
            module.eps = 0.5
        if isinstance(module, layers.MLP):
            module.activation = "relu"
    assert refused(model) == ""
    assert_current(model, before, run)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (layers.MLP, "forward"),
        (layers.Linear, "forward"),
        (layers.Attention, "heads"),
        (layers.Norm, "norm"),
        (nn.Module, "__call__"),
    ],
)
def test_methods_of_a_class_count(cls: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    before, original, calls = run(model), getattr(cls, name), []

    def patched(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return original(self, *arguments, **options)

    monkeypatch.setattr(cls, name, patched)
    assert "was replaced" in refused(model)
    calls.clear()
    logits(model, None)
    assert calls
    monkeypatch.undo()
    assert refused(model) == ""
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_hooks_for_all_modules_count(kind: str) -> None:
    model = model_of("llama")
    run(model)
    seen: list[Any] = []
    register = getattr(torch.nn.modules.module, f"register_module_{kind}")
    handle = register(lambda *a: seen.append(type(a[0])))
    try:
        assert "hooks for all modules" in refused(model)
        assert layers.MLP in seen
        seen.clear()
        logits(model, None)
        assert layers.MLP in seen
        assert layers.Embedding in seen
    finally:
        handle.remove()
    assert refused(model) == ""


def test_parametrisations_weight_norm_and_pruning_count() -> None:
    from torch.nn.utils import parametrizations, prune

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    for change in (
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Twice()),
        parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: nn.utils.weight_norm(layer),
    ):
        model = model_of("llama")
        run(model)
        layer = model.body.layers[1].mlp.down
        change(layer)
        assert refused(model)
        for parameter in layer.parameters():
            parameter.data.mul_(1.5)
        assert refused(model)


def test_training_in_one_layer_counts() -> None:
    model = model_of("bert")
    run(model)
    model.body.layers[1].train()
    ops.explain(reset=True)
    run(model, None)
    (decision,) = (d for d in ops.explain().decisions if d.op == "blocks" and d.calls)
    assert "dropout is on" in decision.refused["native"]


# Memory


def packs_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the bytes of each packed weight."""
    made: list[int] = []
    pack = packed.pack

    def counted(*arguments: Any, **options: Any) -> Any:
        found = pack(*arguments, **options)
        made.append(found.data.numel())
        return found

    monkeypatch.setattr(packed, "pack", counted)
    return made


def kept_bytes(model: Any) -> int:
    """Bytes of memory with packed weights of this model."""
    own = {id(p) for p in model.parameters()}
    storages = [entry.packed.data for key, entry in packed._kept.items() if id(key) in own]
    found = fused.look(model.body)
    storages += [] if isinstance(found, str) else [found.weights]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in storages}.values())


@pytest.mark.parametrize("modules_first", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_weights_are_packed_once_for_whole_passes_and_single_layers(family: str, modules_first: bool) -> None:
    model = model_of(family)
    ids = batch([6])[0].view(1, -1)
    with torch.no_grad():
        if modules_first:
            model(ids, output_hidden_states=True)
        run(model)
        arena = fused.look(model.body)
        assert isinstance(arena, fused.Arena)
        alone = kept_bytes(model)
        ends = [p for name, p in model.named_parameters() if "layers" not in name]
        modules = model(ids, output_hidden_states=True).logits
        logits_of = model(ids).logits
    torch.testing.assert_close(modules, logits_of, atol=1e-4, rtol=1e-4)
    assert kept_bytes(model) - alone <= 3 * sum(p.nbytes for p in ends), "the head's alone come to it"
    blocks = {id(p) for p in model.body.layers.parameters()}
    place = arena.weights.untyped_storage()._cdata
    for key, entry in packed._kept.items():
        assert id(key) not in blocks or entry.packed.data.untyped_storage()._cdata == place


def test_copies_and_files_carry_no_packed_weights(tmp_path: Any) -> None:
    model = model_of("llama")
    before, step = run(model), logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    fresh = model_of("llama")
    plain = io.BytesIO()
    torch.save(fresh, plain)
    assert buffer.tell() <= 1.01 * plain.tell()
    assert len(pickle.dumps(model)) <= 1.01 * len(pickle.dumps(fresh))
    buffer.seek(0)
    twins = [
        torch.load(buffer, weights_only=False),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        copy.copy(model),
    ]
    for twin in twins:
        assert ops.MADE not in vars(twin)
        assert copy.copy(twin.body) is not twin.body
        assert ops.MADE not in vars(copy.copy(twin.body))
        assert torch.equal(run(twin), before)
        assert torch.equal(logits(twin), step)
    for twin in twins[:3]:
        twin.body.layers[0].mlp.up.weight.data.zero_()
        assert not torch.equal(run(twin), before)
    assert torch.equal(run(model), before)


# Threads


def test_threads_that_come_first_pack_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    expected = [run(copy.deepcopy(model)), logits(copy.deepcopy(model))]
    made = packs_of(monkeypatch)
    barrier, wrong = threading.Barrier(6), []

    def work(number: int) -> None:
        try:
            barrier.wait()
            for _ in range(5):
                found = run(model) if number % 2 else logits(model)
                if not torch.equal(found, expected[0 if number % 2 else 1]):
                    wrong.append("another result")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(made) == 4 * len(model.body.layers) + 1


def test_threads_that_change_what_stands_in_the_way_break_nobody() -> None:
    model = model_of("bert")
    expected = run(model)
    stop, wrong = threading.Event(), []

    def change() -> None:
        while not stop.is_set():
            handle = model.body.layers[0].register_forward_hook(lambda *a: None)
            handle.remove()
            model.body.layers[0].note = 1
            del model.body.layers[0].note

    def work() -> None:
        try:
            for _ in range(60):
                torch.testing.assert_close(run(model, None), expected, atol=1e-4, rtol=1e-4)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    changing = threading.Thread(target=change)
    for thread in (changing, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    changing.join()
    assert not wrong


# torch.func


def test_functional_call_with_other_tensors_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("bert")
    ids = batch([6])[0].view(1, -1)
    with torch.no_grad():
        before = model(ids).logits
        made = packs_of(monkeypatch)
        others = {name: p * 1.2 for name, p in model.named_parameters()}
        for _ in range(2):
            found = torch.func.functional_call(model, others, (ids,)).logits
            twin = copy.deepcopy(model)
            twin.load_state_dict(others, strict=False)
            with ops.backend("reference"):
                torch.testing.assert_close(found, twin(ids).logits, atol=1e-3, rtol=1e-3)
        assert made == []
        assert torch.equal(model(ids).logits, before)
    assert made == []


def test_vmap_is_refused_in_words() -> None:
    model = model_of("bert")
    ids = batch([6])[0].view(1, 1, -1)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch\.vmap cannot run a minilm model"):
        torch.vmap(lambda some: model(some).logits)(ids)


# Errors


def test_an_error_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    cache = model.new_cache(2)
    tokens, found = batch([5, 3])
    free = torch.tensor([[4], [5]])

    def state() -> Any:
        return dict(cache.lengths), {row: len(pages) for row, pages in cache._pages_of.items()}

    with torch.no_grad():
        model.run_packed(tokens, found, cache=cache, rows=cache.rows)
        before = state()
        bad = torch.tensor([4, 999])
        for backend in ("native", "reference"):
            with ops.backend(backend):
                for count in (1, 3, 60):
                    with pytest.raises((RuntimeError, IndexError)):
                        model.steps(bad, cache.rows, cache, count)
                    assert state() == before
                with pytest.raises((RuntimeError, IndexError)):
                    model.run_packed(bad, batch([1, 1])[1], cache=cache, rows=cache.rows)
                assert state() == before
                with pytest.raises(ValueError, match="labels"):
                    model(free, past_key_values=cache, labels=torch.tensor([[1, 2, 3]]))
                assert state() == before
                handle = model.body.layers[1].register_forward_hook(lambda *a: 1 / 0)
                for call in (
                    lambda: model(free, past_key_values=cache),
                    lambda: model.step(free[:, 0], cache.rows, cache),
                    lambda: model.run_packed(free[:, 0], batch([1, 1])[1], cache=cache, rows=cache.rows),
                ):
                    with ops.backend("auto"), pytest.raises(ZeroDivisionError):
                        call()
                    assert state() == before
                handle.remove()
        expected = model.step(free[:, 0], cache.rows, copy.deepcopy(cache))[0]
        assert torch.isfinite(expected).all()


def test_a_step_looks_at_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing walks through the modules when nothing has changed."""
    model = model_of("llama")
    logits(model)
    monkeypatch.setattr(decode_step, "_refusal", None)
    monkeypatch.setattr(fused, "_refusal", None)
    monkeypatch.setattr(nn.Module, "modules", None)
    logits(model)
