"""What happens when a model's `forward` is called while a graph is made."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree


def in_graph() -> bool:
    """Whether a graph is being made: the values of tensors are then unknown."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


@contextmanager
def no_tracer_warnings() -> Iterator[None]:
    """A ``with`` block without the warnings of torch.jit.trace about Python values: the sizes that minilm
    checks are wrong or right for all batches alike."""
    if torch.compiler.is_compiling() or not torch._C._is_tracing():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def graphed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `forward` so that it can be called while a graph is made.

    torch.compile does not compile a call with past_key_values: it runs normally. An exported model has no
    cache: use_cache=True and past_key_values raise ValueError. Under torch.jit.trace the result is a tuple,
    unless return_dict=True.
    """

    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind != p.VAR_KEYWORD][1:]

    @functools.wraps(forward)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        if not in_graph():
            return forward(self, *arguments, **options)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            if options.get("past_key_values") is None:
                return forward(self, *arguments, **options)
            from .outside import uncompiled

            return uncompiled(forward, self, *arguments, **options)
        if not torch.compiler.is_compiling():  # torch.onnx passes keyword arguments by position
            options = {**dict(zip(names, arguments, strict=False)), **options}
            arguments = ()
            options["return_dict"] = bool(options.get("return_dict"))
        if self.spec.causal and (options.get("past_key_values") is not None or options.get("use_cache")):
            raise ValueError(
                "an exported model has no KV cache: leave out past_key_values and use_cache=True"
            )
        options["use_cache"] = False
        with no_tracer_warnings():
            return forward(self, *arguments, **options)

    return run


def register_output(cls: type[Any]) -> None:
    """Register a class of results, dicts by the names of their fields, with torch.export, which flattens and
    rebuilds them."""
    pytree.register_pytree_node(
        cls,
        lambda output: (list(output.values()), list(output)),
        lambda values, names: cls(**dict(zip(names, values, strict=True))),
        serialized_type_name=f"minilm.{cls.__name__}",
        flatten_with_keys_fn=lambda output: (
            [(pytree.MappingKey(name), value) for name, value in output.items()],
            list(output),
        ),
    )
