"""Word wrapping on a terminal for text that arrives in pieces."""

from __future__ import annotations

import re
import shutil
from typing import TextIO


class Wrapped:
    """Writes pieces of a text to a file; on a terminal, a word that does not fit is put on the next line.

    Widths are those on the screen (two columns for most East Asian characters). A word is written when it is
    complete; the terminal breaks a word that is longer than a line.
    """

    def __init__(self, file: TextIO, width: int | None = None) -> None:
        self._file = file
        self._width = width if width or not file.isatty() else shutil.get_terminal_size().columns
        self._column = 0
        self._space = self._word = ""

    def write(self, piece: str) -> None:
        """Write the next piece."""
        if not self._width:
            self._file.write(piece)
        else:
            for part in re.findall(r"\n|[^\S\n]+|\S+", piece):
                if part.isspace():
                    self._put_word()
                    if part == "\n":
                        self._file.write("\n")
                        self._column, self._space = 0, ""
                    else:
                        self._space += part
                else:
                    self._word += part
        self._file.flush()

    def end(self, more: str = "") -> None:
        """Write the unfinished word, `more`, and the end of the line."""
        if self._width:
            self._put_word()
        self._file.write(f"{more}\n")
        self._file.flush()
        self._column, self._space = 0, ""

    def _put_word(self) -> None:
        from rich.cells import cell_len

        if not self._word:
            return
        space, word = self._space.expandtabs(4), self._word
        long = cell_len(space) + cell_len(word)
        if self._column and self._width and self._column + long > self._width:
            self._file.write("\n")
            self._column, space, long = 0, "", cell_len(word)
        self._file.write(space + word)
        self._column += long
        self._space = self._word = ""
