"""The application: its commands, and the one place where errors become a line on standard error and an exit
status.

Exit status: 0 success; 2 an error that the message explains (a wrong option, a missing file, a checkpoint
that does not fit); 1 a bug in minilm; 130 Ctrl-C; 141 the output pipe was closed (`| head`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import typer

from .._version import __version__
from .errors import State, closed_pipe, report, tidy_messages
from .options import bare


class Group(typer.core.TyperGroup):
    """The top-level group. Errors are reported by `errors.report`, not by typer's boxes and tracebacks."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and end the process with the exit status, unless the caller wants the exceptions."""
        run = partial(super().main, args, prog_name, complete_var, False, windows_expand_args)
        if not standalone_mode:
            return run(**extra)
        state = State()
        try:
            with tidy_messages():
                result = run(obj=state, **extra)
            status = result if isinstance(result, int) else 0
        except Exception as error:
            status = report(error, debug=state.debug)
        raise SystemExit(status)

    def get_help_option(self, ctx: Any) -> Any:
        """As in the base class; only untyped."""
        return bare(super().get_help_option(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Output is flushed here, so that a closed pipe raises its error here."""
        try:
            result = super().invoke(ctx)
            typer.get_text_stream("stdout").flush()
            return result
        except BrokenPipeError:
            closed_pipe()
            raise typer.Exit(141) from None


app = typer.Typer(
    cls=Group,
    name="minilm",
    help="Transformer models on the command line: embeddings, text generation, and inspection of "
    "checkpoints.",
    epilog="Start with:  minilm doctor",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"minilm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    version: bool = typer.Option(
        False, "--version", metavar="", callback=_version, is_eager=True, help="Print the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", metavar="", help="Show the traceback of an error."),
) -> None:
    if isinstance(ctx.obj, State):
        ctx.obj.debug |= debug
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _add_commands() -> None:
    from .commands import bench, encode, files, machine, quantize, tasks, tune, write

    for module in (encode, tasks, write, files, quantize, machine, bench, tune):
        module.add_to(app)


_add_commands()
