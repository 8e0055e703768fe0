"""Options that several commands share, as dataclasses: a command has one parameter `run: Runtime` for all of
them.

`command` registers a function as a command of an app. A parameter whose type is a dataclass becomes one
option or argument for each field.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ..files import DEFAULT_DECODER, DEFAULT_ENCODER
from .errors import State, note

if TYPE_CHECKING:
    import torch

MODEL_HELP = "A folder, a GGUF file, or a name on the Hugging Face hub."


NARROW = 80
"""On terminals narrower than this, help has no table: each option has a line, with its help indented
below."""


class Command(typer.core.TyperCommand):
    """A command whose `--help` shows no Python types, and does not cut names on a narrow terminal."""

    def get_help_option(self, ctx: Any) -> Any:
        """As in the base class."""
        return bare(super().get_help_option(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As in the base class, if the terminal is wide enough for a table."""
        width = shutil.get_terminal_size().columns
        if width >= NARROW:
            for parameter in self.params:
                if parameter.param_type_name == "argument":
                    parameter.display_type_rich = lambda ctx: None  # type: ignore[attr-defined]
            super().format_help(ctx, formatter)
        else:
            formatter.write("\n".join(_narrow_help(self, ctx, width)))


def _narrow_help(command: Command, ctx: Any, width: int) -> Iterator[str]:
    """The help in lines of at most `width` characters, except for longer names."""
    wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    yield from wrap.wrap(f"Usage: {ctx.command_path} {' '.join(command.collect_usage_pieces(ctx))}")
    for paragraph in (command.help or "").split("\n\n"):
        yield ""
        yield from wrap.wrap(paragraph)
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        found: list[Any] = [p for p in command.get_params(ctx) if p.param_type_name == kind]
        if found:
            yield from ("", f"{title}:")
        for parameter in found:
            names = ", ".join((*parameter.opts, *parameter.secondary_opts)) if kind == "option" else ""
            yield f"  {names} {parameter.metavar or ''}".rstrip() if names else f"  {parameter.metavar}"
            shown = textwrap.TextWrapper(
                width, initial_indent=" " * 6, subsequent_indent=" " * 6,
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
            yield from shown.wrap(f"{parameter.help or ''}{_limits(parameter)}")
    for paragraph in (command.epilog or "").split("\n\n"):
        yield from ("", *wrap.wrap(paragraph)) if paragraph.endswith(":") else wrap.wrap(paragraph)
    yield ""


def _limits(parameter: Any) -> str:
    """The minimum and the default, if there are any to show."""
    least, default = getattr(parameter, "min", None), parameter.default
    found = [] if least is None else [f"at least {least:g}"]
    told = isinstance(default, (str, int, float)) and default is not False and default != ""
    if told and getattr(parameter, "show_default", False):
        found.append(f"default: {default}")
    return f" [{'; '.join(found)}]" if found else ""


def bare(option: Any) -> Any:
    """An option that takes no value, so that help shows none."""
    if option is not None and option.metavar is None:
        option.metavar = ""
    return option


def paragraphs(text: str | None) -> str:
    """A docstring with one line per paragraph, since the terminal breaks the lines."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n"))


def command(
    app: typer.Typer, name: str, *, panel: str, examples: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command `name`. Its docstring is the help; `examples` (one per line) are
    shown below it."""
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
        help = paragraphs(function.__doc__)
        app.command(name, cls=Command, help=help, epilog=epilog, rich_help_panel=panel)(run)
        return function

    return decorate


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    if get_origin(annotation) is Annotated and get_args(annotation)[0] is bool:
        bare(get_args(annotation)[1])
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _debug(ctx: typer.Context, wanted: bool) -> bool:
    if isinstance(ctx.obj, State):
        ctx.obj.debug |= wanted
    return wanted


Debug = Annotated[
    bool, typer.Option("--debug", callback=_debug, is_eager=True, help="Show the traceback of an error.")
]
Encoder = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP)]
Decoder = Encoder
ENCODER, DECODER = DEFAULT_ENCODER, DEFAULT_DECODER
DType = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; default: the checkpoint's."),
]


@dataclass
class Runtime:
    """Where and how a model runs."""

    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:1; default: a GPU if there is one."),
    ] = None
    dtype: DType = None
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Quantise the weights: int8, q8_0 (q8), q4_0 or q4_1 (q4); gguf keeps the formats of a "
            "GGUF file.",
        ),
    ] = None
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="native, triton, torch or reference, or several, preferred first: only these may run. "
            "Default: chosen for each op.",
        ),
    ] = None
    explain: Annotated[
        bool, typer.Option("--explain", help="Print on standard error which implementation of each op ran.")
    ] = False

    @contextmanager
    def running(self, model: str) -> Iterator[torch.device]:
        """Report that `model` is being loaded, check the options, set the backend for the block, and yield
        the device. Imports torch."""
        note(f"loading {model} ...")  # before importing PyTorch, which takes seconds
        import torch

        from ..model import as_device, as_dtype
        from ..ops import backend, explain

        as_dtype(self.dtype)
        try:
            device = as_device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"), None)
        except RuntimeError as error:  # raised by torch.device for an unknown name
            raise ValueError(f"--device {self.device}: {str(error).splitlines()[0]}") from error
        explain(reset=True)
        names = [name.strip() for name in (self.backend or "").split(",")]
        chosen = (
            nullcontext() if self.backend is None else backend(*names)
        )  # else MINILM_BACKEND, if it is set
        with chosen, torch.inference_mode():
            yield device
        if self.explain:
            typer.echo(str(explain()), err=True)


__all__ = ["DECODER", "ENCODER", "DType", "Decoder", "Encoder", "Runtime", "command", "note"]
