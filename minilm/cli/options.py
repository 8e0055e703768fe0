"""Options that several commands share, as dataclasses: a command takes `run: Runtime` in place of five
arguments.

`command` registers a function as a command of an app; parameters whose type is a dataclass are unfolded
into that dataclass's fields, each an option or argument of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..files import DEFAULT_DECODER, DEFAULT_ENCODER
from .errors import State, note

if TYPE_CHECKING:
    import torch

MODEL_HELP = "A folder, a GGUF file, or a name on the Hugging Face hub."


def command(
    app: typer.Typer, name: str, *, panel: str, examples: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command `name`. Its docstring is the help, `examples` (one a line) end
    it."""
    epilog = "Examples:\n\n" + "\n\n".join(line.strip() for line in examples.strip().splitlines())

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups = {key: kind for key, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)}
        parameters: list[inspect.Parameter] = []
        owners: dict[str, str] = {}
        for key, parameter in inspect.signature(function).parameters.items():
            if key not in groups:
                parameters.append(_parameter(key, hints[key], parameter.default))
                continue
            group_hints = get_type_hints(groups[key], include_extras=True)
            for field in fields(groups[key]):
                default = inspect.Parameter.empty if field.default is MISSING else field.default
                parameters.append(_parameter(field.name, group_hints[field.name], default))
                owners[field.name] = key
        parameters.append(_parameter("debug", Debug, False))

        def run(**values: Any) -> None:
            values.pop("debug")
            arguments: dict[str, Any] = {key: {} for key in groups}
            for key, value in values.items():
                if key in owners:
                    arguments[owners[key]][key] = value
                else:
                    arguments[key] = value
            function(**{k: groups[k](**v) if k in groups else v for k, v in arguments.items()})

        run.__name__ = function.__name__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, help=inspect.getdoc(function), epilog=epilog, rich_help_panel=panel)(run)
        return function

    return decorate


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _debug(ctx: typer.Context, wanted: bool) -> bool:
    if isinstance(ctx.obj, State):
        ctx.obj.debug |= wanted
    return wanted


Debug = Annotated[
    bool, typer.Option("--debug", callback=_debug, is_eager=True, help="Show the traceback of an error.")
]
Encoder = Annotated[str, typer.Option("--model", "-m", metavar="NAME_OR_FOLDER", help=MODEL_HELP)]
Decoder = Encoder
ENCODER, DECODER = DEFAULT_ENCODER, DEFAULT_DECODER
DType = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; if not given, the checkpoint's."
    ),
]


@dataclass
class Runtime:
    """Where and how a model runs."""

    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:1; if not given, a GPU if there is one."),
    ] = None
    dtype: DType = None
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Quantise the weights: int8, q8_0 (q8), q4_0 or q4_1 (q4); gguf takes those of a GGUF file "
            "as they are.",
        ),
    ] = None
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="native, triton, torch or reference, or several, best first: only these may run. "
            "If not given, each op chooses.",
        ),
    ] = None
    explain: Annotated[
        bool, typer.Option("--explain", help="Tell on standard error which implementation of each op ran.")
    ] = False

    @contextmanager
    def running(self) -> Iterator[torch.device]:
        """Check the options, choose the backend for what runs inside, give the device. Imports torch."""
        import torch

        from ..model import as_device, as_dtype
        from ..ops import backend, explain

        as_dtype(self.dtype)
        try:
            device = as_device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"), None)
        except RuntimeError as error:  # torch.device of a word that it does not know
            raise ValueError(f"--device {self.device}: {str(error).splitlines()[0]}") from error
        explain(reset=True)
        names = [name.strip() for name in (self.backend or "auto").split(",")]
        with backend(*names), torch.inference_mode():
            yield device
        if self.explain:
            typer.echo(str(explain()), err=True)


__all__ = ["DECODER", "ENCODER", "DType", "Decoder", "Encoder", "Runtime", "command", "note"]
