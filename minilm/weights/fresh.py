"""Random initialisation of parameters that are not loaded from a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor


def initialise(name: str, parameter: Tensor, std: float, *, plus_one: bool = False) -> None:
    """Initialise a parameter: norms to the identity (0 with `plus_one`, since they multiply by 1 + weight),
    biases to zero, all others normal with mean 0."""
    if name.endswith("bias"):
        parameter.zero_()
    elif "norm" in name.split(".")[-2:][0] and name.endswith("weight"):
        parameter.fill_(0.0 if plus_one else 1.0)
    else:
        parameter.normal_(0.0, std)


@torch.no_grad()
def resized(name: str, old: Tensor, rows: int, near_mean: bool, std: float) -> Tensor:
    """`old` with fewer or more rows. New rows are initialised at random, or, with `near_mean`, sampled around
    the mean of the old rows with 1e-9 of their covariance (transformers' `mean_resizing`)."""
    new, kept = old.new_empty(rows, *old.shape[1:]), min(len(old), rows)
    initialise(name, new, std)
    if near_mean and rows > kept and old.device.type != "meta":
        mean = old.float().mean(0)
        some = old[torch.randperm(len(old), device=old.device)[:1024]].float() - mean
        noise = torch.randn(rows - kept, len(some), device=old.device) @ some
        new[kept:] = (mean + noise * (1e-9 / len(some)) ** 0.5).to(old.dtype)
    new[:kept] = old[:kept]
    return new
