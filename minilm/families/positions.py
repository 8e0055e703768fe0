"""The options of a config.json about positions: rope with its scaled variants, and the windows of layers.

transformers 4 and 5 write them under different names; both are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..config import LARGEST, ROPE_RANGES, ConfigError, RopeConfig, check_number
from .family import Options


def rope_config(
    hf: Options,
    default_theta: float = 10_000.0,
    *,
    partial: bool = False,
    given: Mapping[str, Any] | None = None,
) -> RopeConfig:
    """Rope options, as transformers 5 writes them (`rope_parameters`) or transformers 4 did (`rope_theta`,
    `rope_scaling`). `partial`: the family reads partial_rotary_factor (`rotary_dim`). `given`: these options,
    with a rope_theta, instead of those."""
    given = (hf.get("rope_scaling") or hf.get("rope_parameters") or {}) if given is None else given
    if not isinstance(given, dict):
        raise ConfigError(f"{hf.model_type}: rope_scaling must be a mapping of options, and is {given!r}")
    options: dict[str, Any] = dict(given)
    kind = options.get("rope_type", options.get("type", "default"))
    if any(isinstance(value, dict) for value in options.values()):
        raise ConfigError(
            f"{hf.model_type}: separate rope_parameters per layer type are not supported: {options}"
        )
    known = {
        "default": set(),
        "linear": {"factor"},
        "dynamic": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {
            *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
            "original_max_position_embeddings",
        },
    }
    if kind not in list(known):  # `kind` may be of any type, also unhashable
        raise ConfigError(
            f"{hf.model_type}: rope_type {kind!r} is not supported; supported are {', '.join(known)}"
        )
    check_number(f"{hf.model_type}: max_position_embeddings", hf.max_position_embeddings, 1, LARGEST)
    positions = int(hf.max_position_embeddings)
    factor: Any = options.get("factor")
    original = options.get("original_max_position_embeddings") or positions
    if kind in ("llama3", "yarn") and hf.get("original_max_position_embeddings"):
        original = hf.original_max_position_embeddings
    check_number(f"{hf.model_type}: original_max_position_embeddings", original, 1, LARGEST)
    if kind == "yarn" and factor is None:
        factor = positions / original
    if kind != "default" and (not isinstance(factor, (int, float)) or factor <= 0):
        raise ConfigError(f"{hf.model_type}: rope_type {kind!r} needs a positive factor, and has {factor!r}")
    if not partial and options.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{hf.model_type}: partial_rotary_factor={options['partial_rotary_factor']} is not supported, "
            "only 1.0"
        )
    surplus = set(options) - known[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind == "default":  # leftovers of an unscaled model have no effect in transformers either
        surplus -= {"factor", "original_max_position_embeddings"}
    if surplus:  # a warning, as in transformers: `attn_factor` next to yarn is common, for other software
        names = ", ".join(sorted(map(str, surplus)))
        warnings.warn(
            f"{hf.model_type}: rope_type {kind!r} does not know the options {names}, which have no effect",
            stacklevel=2,
        )
    theta = options.get("rope_theta", hf.get("rope_theta", default_theta))
    numbers = {"theta": theta, "factor": factor if kind != "default" else 1.0}
    for name in ("attention_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        if options.get(name) is not None:
            numbers[name] = options[name]
    for name, value in numbers.items():
        spelled = "rope_theta" if name == "theta" else f"{name} of rope_scaling"
        check_number(f"{hf.model_type}: {spelled}", value, *ROPE_RANGES[name])
    for name in ("mscale", "mscale_all_dim"):
        if options.get(name) is not None:
            check_number(f"{hf.model_type}: {name} of rope_scaling", options[name], 0, 1e3)
    return RopeConfig(
        theta=float(theta),
        type=kind,
        factor=float(factor) if kind != "default" else 1.0,
        max_positions=positions,
        original_max_positions=int(original),
        low_freq_factor=float(numbers.get("low_freq_factor", 1.0)),
        high_freq_factor=float(numbers.get("high_freq_factor", 4.0)),
        attention_factor=_yarn_attention_factor(options, float(factor)) if kind == "yarn" else 1.0,
        beta_fast=float(options.get("beta_fast") or 32),
        beta_slow=float(options.get("beta_slow") or 1),
        truncate=bool(options.get("truncate", True)),
    )


def _yarn_attention_factor(options: Mapping[str, Any], factor: float) -> float:
    from math import log

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * log(factor) + 1.0

    if options.get("attention_factor") is not None:
        return float(options["attention_factor"])
    if options.get("mscale") and options.get("mscale_all_dim"):
        return mscale(options["mscale"]) / mscale(options["mscale_all_dim"])
    return mscale(1.0)


def rotary_dim(hf: Options, head_dim: int, top: str, default: float) -> int:
    """Number of channels of a head that rope rotates: the share `partial_rotary_factor` of the rope options,
    or else the option `top`. Raises ConfigError unless it is from 2 to the head size, and even."""
    options = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    share = options.get("partial_rotary_factor") if isinstance(options, dict) else None
    share = hf.get(top, default) if share is None else share
    check_number(f"{hf.model_type}: {top}", share, 0, 1)
    count = int(head_dim * share)
    if count < 2 or count % 2:
        raise ConfigError(
            f"{hf.model_type}: {top} is {share}, of {head_dim} channels of a head {count}, and rope rotates "
            "an even number of at least 2"
        )
    return count


def layer_windows(
    hf: Options, sliding_window: int | None, usual: list[str] | None = None
) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types`, or else from `usual` types, or else from
    `max_window_layers` (the first N layers have full attention)."""
    types = usual if hf.get("layer_types") is None else hf.layer_types
    if types is None:
        first = hf.max_window_layers
        return tuple(sliding_window if i >= first else None for i in range(hf.num_hidden_layers))
    if not isinstance(types, list):
        raise ConfigError(f"{hf.model_type}: layer_types must be a list of names, and is {types!r}")
    unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise ConfigError(f"{hf.model_type}: layer_types {', '.join(map(str, unknown))} are not supported")
    if "sliding_attention" in types and sliding_window is None:
        raise ConfigError(
            f"{hf.model_type}: layer_types names sliding_attention, and there is no sliding_window"
        )
    return tuple(sliding_window if kind == "sliding_attention" else None for kind in types)
