"""The layout of the packed blocks: the same names on both sides; where each family's norms, ropes and heads
go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_models import model_of
from native_runs import require_extension
from torch import Tensor

from minilm.native import blocks
from minilm.native.arena import HEADER, LAYER, Arena, first_blocks
from minilm.ops.backends import packed

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "arena.h"


@pytest.mark.parametrize(("enum", "names"), [("Header", HEADER), ("Layer", LAYER)])
def test_both_sides_have_the_same_names(enum: str, names: tuple[str, ...]) -> None:
    found = re.search(rf"enum class {enum} : int64_t {{([^}}]*)}}", SOURCE.read_text())
    assert found is not None
    spelled = [re.sub("(?<!^)(?=[A-Z])", "_", name[1:]).lower() for name in re.findall(r"k\w+", found[1])]
    assert spelled == [*names, "count"]


def layout_of(family: str, **options: Any) -> tuple[Arena, list[dict[str, int]]]:
    """The arena of a model, and its numbers: the header, then each layer."""
    require_extension()
    with torch.no_grad():
        arena = blocks.look(model_of(family, **options).body)
    assert isinstance(arena, Arena)
    numbers = arena.layout.tolist()
    rows = [numbers[at : at + len(LAYER)] for at in range(len(HEADER), len(numbers), len(LAYER))]
    layers = [dict(zip(LAYER, row, strict=True)) for row in rows]
    return arena, [dict(zip(HEADER, numbers[: len(HEADER)], strict=True)), *layers]


PLACES = {
    "bert": {"attention_sum", "mlp_sum"},
    "llama": {"attention_read", "mlp_read"},
    "olmo2": {"attention_added", "mlp_added"},
    "gpt_neox": {"attention_read", "mlp_read"},
    "phi": {"attention_read", "mlp_read"},
    "gemma2": {"attention_read", "attention_added", "mlp_read", "mlp_added"},
}


@pytest.mark.parametrize("family", PLACES)
def test_norms_stand_where_the_family_has_them(family: str) -> None:
    _, (header, *layers) = layout_of(family)
    assert header["parallel"] == (family in ("gpt_neox", "phi"))
    assert len(layers) == 2
    for layer in layers:
        found = {name[:-7] for name, at in layer.items() if name.endswith("_weight") and at >= 0}
        assert found == PLACES[family]
        biased = {name[:-5] for name, at in layer.items() if name.endswith("_bias") and at >= 0}
        assert biased == (found if family in ("bert", "gpt_neox", "phi") else set())


def test_modernbert_begins_without_a_norm_and_its_norms_have_no_bias() -> None:
    _, (header, *layers) = layout_of("modernbert")
    names = [
        {name for name, at in layer.items() if name.endswith(("_weight", "_bias")) and at >= 0}
        for layer in layers
    ]
    assert names == [{"mlp_read_weight"}, *[{"attention_read_weight", "mlp_read_weight"}] * 3]
    assert header["final_norm_weight"] >= 0
    assert header["final_norm_bias"] == -1
    assert [(layer["window"], layer["turns"]) for layer in layers] == [(0, 1), (6, 2), (6, 2), (0, 1)]


def test_a_shared_block_has_one_place() -> None:
    one, _ = layout_of("albert", num_hidden_layers=1)
    several, (_, *layers) = layout_of("albert", num_hidden_layers=5)
    assert len(layers) == 5
    assert all(layer == layers[0] for layer in layers)
    assert several.weights.numel() == one.weights.numel()


def test_gemmas_norms_are_packed_with_the_one_added() -> None:
    model = model_of("gemma2")
    with torch.no_grad():
        arena = blocks.look(model.body)
    assert isinstance(arena, Arena)
    layout = dict(zip(LAYER, arena.layout[len(HEADER) :].tolist(), strict=False))
    for name, norm in (("mlp_added", "mlp_out_norm"), ("attention_read", "attention_norm")):
        at = layout[f"{name}_weight"]
        stored = arena.weights[at : at + 160].view(torch.float32)
        assert torch.equal(stored, 1 + getattr(model.body.layers[0], norm).weight)


def test_layers_turn_by_their_own_rope() -> None:
    for family, turns in (("smollm3", [1, 0]), ("gemma3_text", [2, 1]), ("gemma2", [1, 1])):
        _, (_, *layers) = layout_of(family)
        assert [layer["turns"] for layer in layers] == turns


def test_the_first_blocks_have_no_final_norm() -> None:
    arena, (header, layer, _) = layout_of("llama")
    part = first_blocks(arena.layout, 1).tolist()
    assert part[: len(HEADER)] == list(
        (header | {"layers": 1, "final_norm_weight": -1, "final_norm_bias": -1}).values()
    )
    assert part[len(HEADER) :] == list(layer.values())


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_a_matrix_in_the_order_of_heads_is_as_given_for_who_asks_for_it(heads: int, size: int) -> None:
    """Its panels have all q, then all k, then all v."""
    require_extension()
    generator = torch.Generator().manual_seed(heads)
    weight, bias = torch.randn(3 * heads * size, 7, generator=generator), torch.randn(3 * heads * size)
    x = torch.randn(2, 4, 7, generator=generator)
    made = packed.pack(weight, bias, heads=heads)

    def by_kind(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (heads, 3, size)).transpose(-3, -2).flatten(-3)

    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(packed.product(x, made, None), expected, atol=1e-5, rtol=1e-5)
    stored = torch.ops.minilm.packed_linear(
        x.flatten(0, 1), made.data, made.format, made.columns, made.places, 0, False
    )
    torch.testing.assert_close(stored, by_kind(expected.flatten(0, 1)), atol=1e-5, rtol=1e-5)
