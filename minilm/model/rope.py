"""Rotary position embedding: the rotation angle of each pair of a head's dimensions, for each position.

Position p rotates the pair (i, i + D/2) by p * f_i, f_i = theta^(-2i/D), so that q·k depends only on the
distance between two tokens (Su et al. 2021, arXiv:2104.09864). The scaled variants change the f_i (see
`RopeConfig`); their formulas are here.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from ..config import RopeConfig
from ..graphs import in_graph


def frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """The f_i, float32 [D/2], for sequences within `config.max_positions`."""
    plain = _plain(config.theta, head_dim)
    if config.type == "linear":
        return plain / config.factor
    if config.type == "llama3":
        return _llama3(config, plain)
    if config.type == "yarn":
        return _yarn(config, plain, head_dim)
    return plain


@cache
def _kept_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """`frequencies`, cached, since every decoding step needs them. On the CPU, and usable by autograd even if
    the first caller was in inference mode."""
    with torch.inference_mode(False), torch.device("cpu"):
        return frequencies(config, head_dim)


def _plain(theta: float | Tensor, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if isinstance(theta, Tensor):
        return 1.0 / theta[..., None] ** exponents.to(theta.device)
    return 1.0 / theta**exponents


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Frequencies with wavelengths longer than original/low_freq_factor are divided by `factor`, those with
    wavelengths shorter than original/high_freq_factor kept."""
    wavelength = 2 * math.pi / plain
    ramp = (config.original_max_positions / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    ramp = ramp.clamp(0, 1)  # 0: divided by factor, 1: kept
    return (1 - ramp) * plain / config.factor + ramp * plain


def _yarn(config: RopeConfig, plain: Tensor, head_dim: int) -> Tensor:
    """Frequencies with more than beta_fast rotations over the original context are kept, those with fewer
    than beta_slow divided by `factor`."""

    def dimension(turns: float) -> float:
        return (
            head_dim
            * math.log(config.original_max_positions / (turns * 2 * math.pi))
            / (2 * math.log(config.theta))
        )

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / config.factor * slowed + plain * (1 - slowed)


def angles(
    config: RopeConfig, head_dim: int, positions: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, D/2], at `positions` [T].

    `context` [T] is the current length of each token's sequence. Only `dynamic` uses it: beyond
    `max_positions`, theta grows with it, separately for each sequence.
    """
    if config.type == "dynamic" and context is not None and _any(context > config.max_positions):
        stretch = config.factor * context.clamp(min=config.max_positions) / config.max_positions - (
            config.factor - 1
        )
        f = _plain(config.theta * stretch.float() ** (head_dim / (head_dim - 2)), head_dim)  # [T, D/2]
    elif _few(positions):
        cos, sin = angle_table(config, head_dim, _IN_TABLE)
        return cos[positions], sin[positions]
    else:
        known = frequencies if in_graph() else _kept_frequencies
        f = known(config, head_dim).to(positions.device)
    turned = positions[:, None].float() * f
    return turned.cos() * config.attention_factor, turned.sin() * config.attention_factor


def _any(flags: Tensor) -> bool:
    """Whether one is true; in a graph, whether one may be."""
    return in_graph() or bool(flags.any())


_IN_TABLE = 2048


@lru_cache(maxsize=8)
def angle_table(config: RopeConfig, head_dim: int, count: int) -> tuple[Tensor, Tensor]:
    """`angles` of the first `count` positions, on the CPU, cached."""
    with torch.inference_mode(False), torch.device("cpu"):
        turned = torch.arange(count)[:, None].float() * frequencies(config, head_dim)
        return turned.cos() * config.attention_factor, turned.sin() * config.attention_factor


def _few(positions: Tensor) -> bool:
    """Whether to use the table. For short texts, starting threads would take longer than the cosines."""
    if type(positions) is not Tensor or positions.device.type != "cpu" or not 0 < len(positions) <= _IN_TABLE:
        return False  # a fake tensor (torch.compile) has no values
    if in_graph():
        return False
    least, most = positions.aminmax()
    return int(least) >= 0 and int(most) < _IN_TABLE
