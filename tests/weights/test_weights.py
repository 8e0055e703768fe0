"""Loading: what goes where, what is an error, heads, values, memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_family import (
    KV,
    PREFIXES,
    RULES,
    C,
    F,
    Model,
    V,
    expected,
    fails,
    fill_with_sevens,
    load,
    no_init,
    on_meta,
    still_meta,
    stored,
    write,
)
from torch import Tensor, nn

from minilm.files.checkpoint import Checkpoint, TensorInfo, WeightError
from minilm.files.opening import open_checkpoint
from minilm.weights.loading import LoadReport, MapEntry, load_weights, weight_map
from minilm.weights.rules import copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("prefix", ["", "base.", "other."])
def test_values(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    tensors = stored()
    path = write(tmp_path / "m", {prefix + name: tensor for name, tensor in tensors.items()})
    model = on_meta()
    model.body.embeddings.tokens.weight.requires_grad_(False)
    report = load(path, model, dtype=dtype)
    want = expected(tensors)
    state = model.state_dict()
    assert state.keys() == want.keys()
    for name, value in want.items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], value.to(dtype)), name
        assert state[name].is_contiguous()
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not grads.pop("body.embeddings.tokens.weight")
    assert all(grads.values())
    assert report == LoadReport(loaded=len(tensors))


def test_gamma_and_beta(tmp_path: Path) -> None:
    tensors = stored()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    assert old.keys() != tensors.keys()
    model = on_meta()
    load(write(tmp_path / "m", old), model)
    assert torch.equal(model.body.layers[1].mlp_norm.weight, tensors["h.1.LayerNorm.weight"])
    assert torch.equal(model.body.layers[1].mlp_norm.bias, tensors["h.1.LayerNorm.bias"])


def test_old_and_new_name_of_one_tensor_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m", stored(**{"h.1.LayerNorm.gamma": torch.ones(C)}))
    with pytest.raises(
        WeightError, match=r"h\.1\.LayerNorm\.(gamma|weight) and .* are two names of one tensor"
    ):
        load(path, on_meta())


def test_parameter_that_is_used_twice_stays_one(tmp_path: Path) -> None:
    tensors = stored(
        prefix="base.", **{"cls.out.weight": torch.ones(V, C), "cls.out.bias": torch.arange(V) / 2}
    )
    model = on_meta(lm="shared")
    report = load(write(tmp_path / "m", tensors), model)
    assert model.head.decoder.weight is model.body.embeddings.tokens.weight
    assert torch.equal(model.head.decoder.weight, tensors["base.emb.weight"])
    assert report.skipped == {"cls.out.weight": "tied to the embeddings"}
    assert report.loaded == len(tensors) - 1


def test_tied_rule_copies_where_the_model_owns_the_parameter(tmp_path: Path) -> None:
    tensors = stored(prefix="base.", **{"cls.out.weight": torch.rand(V, C), "cls.out.bias": torch.rand(V)})
    path = write(tmp_path / "m", tensors)
    model = on_meta(lm="untied")
    assert not load(path, model).skipped
    assert torch.equal(model.head.decoder.weight, tensors["cls.out.weight"])
    model = on_meta(lm="tied")
    assert load(path, model).skipped == {"cls.out.weight": "tied to the embeddings"}
    assert torch.equal(model.head.bias, tensors["cls.out.bias"])


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["cls.bias", "cls.out.bias"], "cls.out.bias"),
        (["cls.old.bias", "cls.bias"], "cls.bias"),
        (["cls.old.bias"], "cls.old.bias"),
    ],
)
def test_also_takes_the_first_name_that_is_there(tmp_path: Path, names: list[str], read: str) -> None:
    biases = {name: torch.rand(V) for name in names}
    model = on_meta(lm="tied")
    report = load(write(tmp_path / "m", stored(prefix="base.", **biases)), model)
    assert torch.equal(model.head.bias, biases[read])
    assert report.skipped == {name: f"the same tensor as {read}" for name in names if name != read}


@pytest.mark.parametrize("prefix", ["", "base."])
@pytest.mark.parametrize(
    ("key", "shape", "target"),
    [
        ("emb.weight", "[11, 6]", "body.embeddings.tokens.weight"),
        ("h.1.k.weight", "[4, 6]", "body.layers.1.attention.qkv.weight"),
        ("h.0.up.weight", "[6, 10]", "body.layers.0.mlp.up.weight"),
    ],
)
def test_missing(tmp_path: Path, prefix: str, key: str, shape: str, target: str) -> None:
    tensors = stored(prefix=prefix)
    del tensors[prefix + key]
    path = write(tmp_path / "m", tensors)
    fails(path, on_meta(), "model.safetensors", f"missing tensor {prefix}{key} of shape {shape} for {target}")


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("h.0.x.weight", ""),
        ("encoder.1", ""),
        ("base.h.0.x.weight", "base."),
        ("base.classifier.weight", "base."),
    ],
)
def test_surplus(tmp_path: Path, key: str, prefix: str) -> None:
    path = write(tmp_path / "m", stored(prefix=prefix, **{key: torch.ones(2)}))
    fails(
        path,
        on_meta(labels=2),
        f"surplus tensor {key}, which matches no rule of the family",
        init=fill_with_sevens,
    )


def test_layers_beyond_the_configuration(tmp_path: Path) -> None:
    path = write(tmp_path / "m", stored(layers=3))
    message = fails(
        path,
        on_meta(layers=2),
        "surplus tensor h.2.",
        "the model with this configuration has no body.layers.2",
    )
    assert "more problems" in message
    fails(path, on_meta(layers=4), "missing tensor h.3.q.weight of shape [6, 6]")


@pytest.mark.parametrize(
    ("key", "shape", "wanted"),
    [
        ("emb.weight", (V + 1, C), [V, C]),
        ("h.0.q.weight", (KV, C), [C, C]),
        ("h.1.v.bias", (KV, 1), [KV]),
        ("h.0.up.weight", (F, C), [C, F]),
        ("h.0.a", (4,), [2]),
        ("h.0.LayerNorm.weight", (), [C]),
    ],
)
def test_misshapen(tmp_path: Path, key: str, shape: tuple[int, ...], wanted: list[int]) -> None:
    path = write(tmp_path / "m", stored(**{key: torch.ones(shape)}))
    for options in ({}, {"ignore_mismatched_sizes": True}):
        fails(path, on_meta(), f"{key} has shape {list(shape)}, expected {wanted} for body.", **options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_integers_are_not_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write(tmp_path / "m", stored(**{"h.0.q.weight": torch.ones(C, C).to(dtype)}))
    fails(path, on_meta(), "h.0.q.weight is stored as", "expected floats")


def test_several_problems_are_told_at_once(tmp_path: Path) -> None:
    tensors = stored(**{"h.0.x": torch.ones(1), "h.1.a": torch.ones(3)})
    del tensors["emb.weight"]
    fails(
        write(tmp_path / "m", tensors),
        on_meta(),
        "surplus tensor h.0.x",
        "missing tensor emb.weight",
        "h.1.a has",
    )


def test_another_family(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"wte": torch.ones(2), "ln_f.weight": torch.ones(2)})
    fails(path, on_meta(), "no tensor in it belongs to a model of this family (ln_f.weight, wte, ...)")


def test_key_that_two_rules_match(tmp_path: Path) -> None:
    path = write(tmp_path / "m", stored())
    twice = (*RULES, copy("emb.weight", "pooler.dense.weight"))
    fails(path, on_meta(), "emb.weight matches more than one rule", rules=twice)


def test_parameter_that_two_tensors_fill(tmp_path: Path) -> None:
    path = write(tmp_path / "m", stored(**{"emb2.weight": torch.ones(V, C)}))
    twice = (*RULES, copy("emb2.weight", "body.embeddings.tokens.weight"))
    fails(path, on_meta(), "body.embeddings.tokens.weight would be filled more than once", rules=twice)


def test_parameter_that_no_rule_fills(tmp_path: Path) -> None:
    path = write(tmp_path / "m", stored())
    model = on_meta()
    model.body.extra = nn.Parameter(torch.empty(1, device="meta"))
    fails(path, model, "no rule has a source for body.extra")


def test_fused_sizes_that_do_not_add_up(tmp_path: Path) -> None:
    class Odd(Model):
        def fused_sizes(self) -> dict[str, tuple[int, ...]]:
            return {"qkv": (C, KV, KV + 1)}

    with torch.device("meta"):
        model = Odd()
    with pytest.raises(ValueError, match=r"14 rows of .*qkv.weight cannot be split into \(6, 4, 5\)"):
        load(write(tmp_path / "m", stored()), model)


def test_meta_buffer_that_nothing_would_fill(tmp_path: Path) -> None:
    model = on_meta()
    model.body.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    fails(write(tmp_path / "m", stored()), model, "buffer body.table")


class Broken(Checkpoint):
    """Opens well, and fails at the last tensor."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.path = Path("broken")
        self.values = tensors
        self.tensors = {
            name: TensorInfo(tuple(value.shape), value.dtype, self.path, "F32")
            for name, value in tensors.items()
        }
        self.reads = 0

    def _read(self, name: str, info: TensorInfo, out: Tensor) -> None:
        self.reads += 1
        if self.reads == len(self.tensors):
            raise WeightError(f"{self.path}: {name} cannot be read")
        out.copy_(self.values[name])

    def close(self) -> None:
        pass


def test_model_is_untouched_when_reading_fails() -> None:
    model, checkpoint = on_meta(), Broken(stored())
    with pytest.raises(WeightError, match="cannot be read"):
        load_weights(model, checkpoint, RULES, PREFIXES, dtype=torch.float32, device="cpu", init=no_init)
    assert checkpoint.reads == len(checkpoint.tensors)
    assert still_meta(model)


def test_nothing_is_read_before_the_plan_is_complete() -> None:
    tensors = stored()
    del tensors["h.1.b"]
    model, checkpoint = on_meta(), Broken(tensors)
    with pytest.raises(WeightError, match=r"missing tensor h\.1\.b"):
        load_weights(model, checkpoint, RULES, PREFIXES, dtype=torch.float32, device="cpu", init=no_init)
    assert checkpoint.reads == 0


def test_head_that_the_checkpoint_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = on_meta(pooler=True, labels=3)
    with caplog.at_level(logging.WARNING):
        report = load(write(tmp_path / "m", stored()), model, init=fill_with_sevens)
    new = ["pooler.dense.weight", "pooler.dense.bias", "head.out.weight", "head.out.bias"]
    assert report.initialised == new
    assert all(bool((parameter == 7).all()) for name, parameter in model.named_parameters() if name in new)
    assert model.head.out.weight.shape == (3, C)
    theirs = ["pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert f"has no {', '.join(theirs)}: these weights are random, train them before use" in caplog.text
    assert all(name in str(report) for name in new)


def test_head_that_the_model_lacks(tmp_path: Path) -> None:
    heads = {
        "base.pooler.dense.weight": torch.ones(C, C),
        "classifier.weight": torch.ones(2, C),
        "cls.bias": torch.ones(V),
        "base.pos_ids": torch.arange(5),
        "base.h.1.mask": torch.ones(3, 3, dtype=torch.bool),
        "somebody.else": torch.ones(1),
        "pooler.dense.weight": torch.ones(2),
    }
    report = load(write(tmp_path / "m", stored(prefix="base.", **heads)), on_meta())
    assert report.skipped == {
        "base.pooler.dense.weight": "the model has no pooler",
        "classifier.weight": "the model has no head",
        "cls.bias": "the model has no head",
        "base.pos_ids": "positions need no storage",
        "base.h.1.mask": "a buffer",
        "somebody.else": "not under 'base.': of another model's head",
        "pooler.dense.weight": "not under 'base.': of another model's head",
    }
    assert all(name in str(report) for name in heads)


def test_other_part_of_a_head(tmp_path: Path) -> None:
    path = write(tmp_path / "m", stored(prefix="base.", **{"classifier.weight": torch.ones(2, C)}))
    report = load(path, on_meta(lm="tied"), init=fill_with_sevens)
    assert report.skipped == {"classifier.weight": "the model has no head.out"}
    assert report.initialised == ["head.bias"]


def test_head_of_another_size(tmp_path: Path) -> None:
    tensors = stored(
        prefix="base.", **{"classifier.weight": torch.ones(2, C), "classifier.bias": torch.ones(2)}
    )
    path = write(tmp_path / "m", tensors)
    model = on_meta(labels=5)
    fails(path, model, "classifier.weight has shape [2, 6], expected [5, 6]", "ignore_mismatched_sizes=True")
    report = load(path, model, init=fill_with_sevens, ignore_mismatched_sizes=True)
    assert report.mismatched == {"head.out.weight": ((2, C), (5, C)), "head.out.bias": ((2,), (5,))}
    assert not report.initialised
    assert bool((model.head.out.weight == 7).all())
    assert "head.out.weight" in str(report)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["h.1.k.weight", "h.0.up.weight", "h.0.b"])
def test_nan_is_announced(tmp_path: Path, key: str, value: float) -> None:
    tensors = stored()
    tensors[key].view(-1)[-1] = value
    path = write(tmp_path / "m", tensors)
    with pytest.warns(UserWarning, match=f"NaN or infinite values, as torch.float32, in {key}$"):
        report = load(path, on_meta())
    assert report.nan == [key]
    assert key in str(report)


def test_overflow_in_half_precision_is_announced(tmp_path: Path) -> None:
    path = write(tmp_path / "m", stored(**{"h.0.q.bias": torch.full((C,), 1e5)}))
    with pytest.warns(UserWarning, match=r"as torch\.float16, in h\.0\.q\.bias"):
        load(path, on_meta(), dtype=torch.float16)
    assert not load(path, on_meta(), dtype=torch.bfloat16).nan


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m", stored())
    load(path, on_meta())
    assert capsys.readouterr().err == ""
    load(path, on_meta(), progress=True)
    assert "loading weights: 100%" in capsys.readouterr().err


def test_weight_map(tmp_path: Path) -> None:
    extra = {"base.pos": torch.arange(3), "cls.bias": torch.ones(V).half(), "classifier.bias": torch.ones(9)}
    tensors = stored(layers=1, prefix="base.", **extra)
    with open_checkpoint(write(tmp_path / "m", tensors)) as checkpoint:
        entries = weight_map(on_meta(layers=1, labels=2, lm="tied"), checkpoint, RULES, PREFIXES)
    table = {entry.source: entry for entry in entries if entry.source}
    assert table.keys() == tensors.keys()
    up = "body.layers.0.mlp.up.weight"
    assert table["base.h.0.up.weight"] == ("base.h.0.up.weight", up, "transpose", (C, F), "F32")
    assert table["base.h.0.v.bias"][1:] == ("body.layers.0.attention.qkv.bias", "fuse 3/3", (KV,), "F32")
    assert table["cls.bias"][1:] == ("head.bias", "copy", (V,), "F16")
    assert table["base.pos"][1:] == ("", "skipped: positions need no storage", (3,), "I64")
    assert table["classifier.bias"].transform == "skipped: its shape is [9], the model needs [2]"
    assert [entry for entry in entries if not entry.source] == [
        MapEntry("", "head.out.weight", "initialised", (2, C), ""),
        MapEntry("", "head.out.bias", "initialised", (2,), ""),
    ]


LOAD_AND_MEASURE = """
import sys
import torch
from torch import nn
from minilm.weights.loading import copy, load_weights, open_checkpoint, transpose

def kilobytes(key):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key)).split()[1])

def load(path, rows, columns):
    with torch.device("meta"):
        model = nn.Module()
        model.body = nn.ModuleList([nn.Linear(rows, columns, bias=False) for _ in range(4)])
        model.head = nn.Linear(5000, 1000 * rows // 2500, bias=False)
    rules = [transpose("t.{i}", "body.{i}.weight"), copy("head", "head.weight")]
    with open_checkpoint(path) as checkpoint:
        dtype = getattr(torch, sys.argv[3])
        load_weights(model, checkpoint, rules, (), dtype=dtype, device="cpu", init=None)
    return model

load(sys.argv[1], 25, 51)  # what the libraries map of themselves when they are first used is not the reader's
before = kilobytes("VmRSS")
model = load(sys.argv[2], 2500, 5001)
after = kilobytes("VmHWM")
print((after - before) * 1024 / sum(parameter.nbytes for parameter in model.parameters()))
print(float(model.body[3].weight[77, 2]), float(model.head.weight[5, 5]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_little_more_than_the_weights(tmp_path: Path) -> None:
    tensors = {f"t.{i}": torch.full((2500, 5001), float(i)) for i in range(4)} | {
        "head": torch.rand(1000, 5000)
    }
    tensors["t.3"][2, 77] = 0.625
    path, small = tmp_path / "big.safetensors", tmp_path / "small.safetensors"
    save_file(tensors, path)
    assert path.stat().st_size > 200e6
    save_file({f"t.{i}": torch.ones(25, 51) for i in range(4)} | {"head": torch.ones(10, 5000)}, small)
    for dtype in ("float32", "bfloat16"):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", LOAD_AND_MEASURE, str(small), str(path), dtype]
        for _ in range(3):  # a machine short of memory gives pages back and forth, and they are counted again
            result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
            ratio, *values = map(float, result.stdout.split())
            if ratio < 1.2:
                break
        assert values == [0.625, float(tensors["head"][5, 5].to(getattr(torch, dtype)))]
        assert 0.9 < ratio < 1.2, f"{dtype}: {ratio:.3f} times the weights"
