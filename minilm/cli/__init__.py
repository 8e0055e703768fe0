"""The command `minilm`.

Heavy packages are imported only by the commands that need them: `minilm --help` does not load torch.

Reading order: `app` (the commands and error handling), `options` (groups of options that commands share),
`texts` (input), `results` (output), then the files in `commands`.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line on `sys.argv`; ends the process with its exit status."""
    from .app import app

    app(prog_name="minilm")
