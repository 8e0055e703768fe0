"""The native products with quantised weights, against the same product in exact arithmetic.

A row of x becomes codes and scales as csrc/cpu/quantized.cpp says; here too, in the same float32 operations,
so that the codes agree, and everything after that is exact in float64. What remains is the rounding of the
sums over the groups, which is bounded, not measured.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilm.ops.backends import native

INT8, Q8, Q4 = 3, 4, 5
GROUP = 32
ROW_GROUP = 192
"""Inputs that share a scale in a row of x, in int8."""


@pytest.fixture(autouse=True)
def _extension_is_there() -> None:
    if native.unavailable is None:
        return
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    compiler = any(map(shutil.which, ("g++", "clang++", "c++")))
    if os.environ.get("MINILM_BUILD_EXT") == "0" or not (compiler and headers):
        pytest.skip(native.unavailable)
    pytest.fail(f"this machine could build the extension, but {native.unavailable}")


class Weight:
    """A matrix [out, in] in one of the formats, packed; the codes are those that `codes` names."""

    def __init__(
        self, kind: int, out: int, columns: int, *, codes: str = "any", scale: float = 1.0, seed: int = 0
    ):
        draw = torch.Generator().manual_seed(seed)
        self.kind, self.out, self.columns = kind, out, columns
        self.groups = 1 if kind == INT8 else columns // GROUP
        low, high = (0, 15) if kind == Q4 else (-128, 127)
        self.codes = {
            "any": lambda: torch.randint(low, high + 1, (out, columns), generator=draw),
            "lowest": lambda: torch.full((out, columns), low),
            "highest": lambda: torch.full((out, columns), high),
            "zero": lambda: torch.zeros(out, columns, dtype=torch.int64),
        }[codes]()
        sizes = (out, self.groups)
        # Both signs, and exact in float16 as those of files are.
        self.scales = (torch.randn(sizes, generator=draw) * scale).clamp(-8000, 8000).half().float()
        minimums = (torch.randn(sizes, generator=draw) * 8 * scale).clamp(-60000, 60000).half().float()
        self.minimums = minimums if kind == Q4 else None

    def pack(self, order: Tensor | None = None) -> Tensor:
        """With the rows as they come, or in `order`."""
        values = self.codes
        if self.kind == Q4:
            low, high = self.codes.view(self.out, -1, 2, GROUP // 2).unbind(2)
            values = (low | high << 4).flatten(1).to(torch.uint8)
        else:
            values = values.to(torch.int8)
        scales = self.scales.flatten() if self.kind == INT8 else self.scales
        order = self.order if order is None else order
        return torch.ops.minilm.pack_linear(
            values, scales, self.minimums, None, order, self.kind, self.columns
        )

    @property
    def order(self) -> Tensor:
        padded = -(-self.out // panel()) * panel()
        return F.pad(torch.arange(self.out, dtype=torch.int32), (0, padded - self.out), value=-1)

    def times(self, x: Tensor) -> Tensor:
        return linear(x, self.pack(), self.kind, self.out, len(self.order))

    def check(self, x: Tensor, y: Tensor) -> None:
        """y is x times the matrix, but for float32's rounding of the sum over the groups."""
        rows, size = len(x), ROW_GROUP if self.kind == INT8 else GROUP
        short = -self.columns % size
        groups = F.pad(x, (0, short)).view(rows, -1, size)
        if self.kind != Q4:  # from the least to the largest, zero between them
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            extent = 0.5 * high.clamp(min=0) - 0.5 * low.clamp(max=0)
            steps = torch.tensor(126.99)
        else:
            extent, steps = groups.abs().amax(-1, keepdim=True), torch.tensor(127.0)
        usable = extent >= 2.0**-119
        codes = (groups * torch.where(usable, steps / extent, 0.0)).round().double()  # [rows, G, n]
        scales = torch.where(usable, extent / steps, 0.0).squeeze(-1).double()  # [rows, G]
        assert (codes.amax(-1) - codes.amin(-1)).max() <= 254
        assert codes.abs().max() <= (127 if self.kind == Q4 else 254)
        weights = F.pad(self.codes, (0, short)).view(self.out, -1, size).double()
        dots = torch.einsum("rgn,ogn->rog", codes, weights)
        # Where codes of x are bytes, they are counted from a zero of their group, and what that takes off a
        # sum is a term of its own.
        zeros = torch.zeros_like(scales) if self.kind == Q4 else zeros_of(codes)
        off = zeros[:, None] * weights.sum(-1)  # [rows, out, G]
        terms = [part * scales[:, None] * self.scales.double() for part in (dots - off, off)]
        if self.minimums is not None:
            terms.append((codes.sum(-1) * scales)[:, None] * self.minimums.double())
        exact = sum(terms).sum(-1)
        # A term is rounded three times and each of the G sums adds its own rounding; products of scales may
        # be subnormal.
        size = sum(term.abs() for term in terms).sum(-1)
        allowed = (2 * scales.shape[1] + 4) * 2.0**-24 * size + 2.0**-148 * (dots.abs() + 1).sum(-1)
        assert y.shape == exact.shape
        error = (y.double() - exact).abs()
        assert bool((error <= allowed).all()), f"{(error / allowed).max():.3g} times the allowed error"


def zeros_of(codes: Tensor) -> Tensor:
    """codes [rows, G, n] of int8 or q8 -> [rows, G]: what the kernel in use takes off those of a group."""
    least = codes.amin(-1).clamp(max=0)
    if platform.machine() in ("aarch64", "arm64"):
        return least + 127
    return least if native.cpu_isa() in ("avx512_vnni", "avx512_bf16") else 0 * least


def panel() -> int:
    return int(native._extension.panel_width())


def linear(x: Tensor, packed: Tensor, kind: int, columns: int, places: int) -> Tensor:
    y: Tensor = torch.ops.minilm.packed_linear(x, packed, kind, columns, places, 0, False)
    return y


def random(*shape: int, seed: int) -> Tensor:
    """Normal numbers, the same for the same arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def columns_of(kind: int) -> st.SearchStrategy[int]:
    return st.integers(1, 400) if kind == INT8 else st.integers(1, 6).map(lambda groups: groups * GROUP)


kinds = pytest.mark.parametrize("kind", [INT8, Q8, Q4], ids=["int8", "q8", "q4"])


@kinds
@settings(max_examples=100)
@given(data=st.data())
def test_is_the_product_of_the_codes(kind: int, data: st.DataObject) -> None:
    columns = data.draw(columns_of(kind), "in")
    weight = Weight(
        kind,
        data.draw(st.integers(1, 70), "out"),
        columns,
        codes=data.draw(st.sampled_from(["any", "any", "lowest", "highest", "zero"]), "codes"),
        scale=data.draw(st.sampled_from([1.0, 1e-3, 1e-7, 2000.0, 0.0]), "scale"),
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    rows = data.draw(st.integers(1, 30), "rows")
    x = random(rows, columns, seed=1) * data.draw(
        st.sampled_from([1.0, 1e-38, 1e-30, 1e-4, 1e20, 1e30]), "size"
    )
    like = data.draw(
        st.sampled_from(["normal", "zero", "one alone", "equal", "halves", "positive", "negative"]), "like"
    )
    row = data.draw(st.integers(0, rows - 1), "row")
    if like == "zero":
        x[row] = 0
    elif like == "one alone":  # all codes but one are zero or one
        x[row, columns // 2] = 300 * x.abs().max()
    elif like == "equal":
        x[row] = -x[row].abs().max()
    elif like in ("positive", "negative"):  # codes on one side of zero
        x[row] = x[row].abs() * (1 if like == "positive" else -1)
    elif like == "halves":  # codes that fall between two integers
        x[row] = torch.randint(-127, 127, (columns,), generator=torch.Generator().manual_seed(2)) + 0.5
        x[row, 0::GROUP] = 127.0
    y = weight.times(x)
    weight.check(x, y)
    alone = weight.times(x[row : row + 1].clone())
    assert torch.equal(alone[0], y[row])


@pytest.mark.parametrize(("kind", "size"), [(INT8, ROW_GROUP), (Q8, GROUP)], ids=["int8", "q8"])
def test_codes_keep_to_a_byte(kind: int, size: int) -> None:
    """Both ends of a group just beyond the middle of two steps: each is rounded outwards."""
    k = torch.arange(254.0)[:, None]
    ends = torch.cat([-(k + 0.5), 253.5 - k], dim=1) * (1 + 2**-18)
    x = F.pad(torch.stack([ends, 3 * ends], dim=1), (0, size - 2)).flatten(1)
    weight = Weight(kind, 40, 2 * size)
    weight.check(x, weight.times(x))


@kinds
def test_rows_do_not_depend_on_their_number(kind: int) -> None:
    """Tiles of every height."""
    weight = Weight(kind, 75, 160)
    x = random(30, 160, seed=3)
    y = weight.times(x)
    for rows in range(30):
        assert torch.equal(weight.times(x[:rows]), y[:rows])


@kinds
def test_rows_do_not_depend_on_threads(kind: int) -> None:
    weight = Weight(kind, 1000, 192)
    x = random(301, 192, seed=4)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 4):
            torch.set_num_threads(n)
            results.append(weight.times(x))
    finally:
        torch.set_num_threads(threads)
    weight.check(x, results[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


@kinds
def test_many_columns(kind: int) -> None:
    """The largest sums of codes: they must not overflow, nor be rounded before their scale is known."""
    columns = 2**18 + 5 if kind == INT8 else 2048
    for codes in ("lowest", "highest", "any"):
        weight = Weight(kind, 33, columns, codes=codes)
        x = torch.full((3, columns), 0.7)
        x[1] *= -1
        x[2] = random(columns, seed=5)
        weight.check(x, weight.times(x))


@kinds
@settings(max_examples=20)
@given(data=st.data())
def test_rows_stand_where_the_order_says(kind: int, data: st.DataObject) -> None:
    weight = Weight(kind, data.draw(st.integers(1, 40), "out"), columns := data.draw(columns_of(kind), "in"))
    places = panel() * data.draw(st.integers(1, 3), "panels")
    rows = st.lists(st.integers(-1, weight.out - 1), min_size=places, max_size=places)
    order = torch.tensor(data.draw(rows, "order"), dtype=torch.int32)
    x = random(5, columns, seed=6)
    y = linear(x, weight.pack(order), kind, places, places)
    expected = F.pad(weight.times(x), (0, 1))[:, order.long()]  # -1: the zeros at the end
    assert torch.equal(y, expected)


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_row_that_is_not_finite_is_nan_and_spoils_no_other(kind: int, value: float) -> None:
    for columns in (32, 96, 160):
        weight = Weight(kind, 40, columns)
        for place in (0, 17, columns - 1):
            x = random(7, columns, seed=7)
            clean = weight.times(x)
            x[2, place] = value
            y = weight.times(x)
            assert y[2].isnan().all()
            kept = torch.arange(7) != 2
            assert torch.equal(y[kept], clean[kept])


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called by its Linux constants")
@kinds
def test_nothing_beyond_the_last_element_is_read(kind: int) -> None:
    """x and the packed weight end where a page begins that may not be touched."""
    page, pages = mmap.PAGESIZE, 8
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * page
    libc = ctypes.CDLL(None, use_errno=True)
    forbid, allow = 0, mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), forbid) == 0, ctypes.get_errno()

    def at_the_end(t: Tensor) -> Tensor:
        whole = torch.frombuffer(memory, dtype=torch.uint8, count=pages * page)
        end = whole[-t.nbytes :].view(t.dtype).view(t.shape)
        return end.copy_(t)

    for columns in (1, 3, 5, 8, 15, 33, 65, 127, 129, 263) if kind == INT8 else (32, 64, 96):
        weight = Weight(kind, 2 * panel() - 3, columns)
        packed, places = weight.pack(), len(weight.order)
        for rows in (1, 5, 13):
            x = random(rows, columns, seed=8)
            expected = weight.times(x)
            assert torch.equal(linear(at_the_end(x), packed, kind, weight.out, places), expected)
            assert torch.equal(linear(x, at_the_end(packed), kind, weight.out, places), expected)
    libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), allow)


OTHER_ISAS = (
    [isa for isa in native.cpu_isas() if isa != native.cpu_isa()]
    if "MINILM_CPU_ISA" not in os.environ
    else []
)


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set(isa: str) -> None:
    """This file again, in a process that is told to use another instruction set than the best."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**environment, "MINILM_CPU_ISA": isa},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout.splitlines()[-1]
