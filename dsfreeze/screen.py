"""What is said on standard error while something runs, and the result on standard output, also where nobody reads them any more.

A run outlives its reader: a closed terminal, a lost ssh connection, `| head`. Every line that matters is in the run's record too.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import IO, Any, TextIO, cast

from rich.console import Console

from dsfreeze.errors import UserError

#: What a pipe and a terminal answer once nobody is at their other end.
_GONE = (errno.EPIPE, errno.EIO)


def screen(**options: Any) -> Console:
    """rich's console on standard error, which never raises for what it could not write. `options` are Console's."""
    if sys.stderr is None:  # closed before this process began (`2>&-`)
        return Console(quiet=True, **options)
    return Console(file=cast(IO[str], _StandardError()), **options)


def write_result(text: str) -> None:
    """To standard output, at once. UserError where it can not be written there; a reader who has gone (`| head`) has read enough."""
    if sys.stdout is None:  # closed before this process began (`>&-`)
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        if not _let_go(sys.stdout, error):
            raise UserError(f"Could not write the result to standard output: {error.strerror}.") from None


def show_result(drawing: Any, **options: Any) -> None:
    """A drawing of rich's, or a line, on standard output, as `write_result`. `options` are those of Console.print."""
    drawn = io.StringIO()
    Console(file=drawn, force_terminal=Console().is_terminal).print(drawing, **options)
    write_result(drawn.getvalue())


class _StandardError(io.TextIOBase):
    """sys.stderr, whatever it is at the moment; once its reader is gone, nothing, for everything else of this process as well."""

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            _let_go(self._stream, error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            _let_go(self._stream, error)

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    def fileno(self) -> int:
        return int(self._stream.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def _stream(self) -> TextIO:
        # while a bar is shown rich puts a proxy there, which writes to its console: to us
        return cast(TextIO, getattr(sys.stderr, "rich_proxied_file", sys.stderr))


def _let_go(stream: TextIO, error: OSError) -> bool:
    """Whether the reader has gone. The stream then leads nowhere: what is left in its buffer would fail again, at the next line, in
    others' bars, and in the exit code."""
    if error.errno not in _GONE:
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return True
