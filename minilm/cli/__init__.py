"""The command `minilm`.

Nothing heavy is imported before a command needs it: `minilm --help` does not load torch.

Reading order: `app` (the commands, and what becomes of an error), `options` (groups of options that
commands share), `texts` (what goes in), `results` (what comes out), then what is in `commands`.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line on `sys.argv`; ends the process with its exit status."""
    from .app import app

    app(prog_name="minilm")
