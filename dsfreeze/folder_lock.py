"""One writer for a folder: a lock that ends with its process, however that ends. No torch.

`flock` on FOLDER/.lock, which holds who has it. A file that a dead process left says nothing: the lock is what counts. Children that are
given the file descriptor hold the lock too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from pathlib import Path
from typing import IO

from dsfreeze.errors import UserError

LOCK = ".lock"
#: What file systems answer that have no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class FolderLock:
    """Use: `take`, once; `release`, or end. `what` names the folder's key in messages, such as train.output_dir."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        self._file: IO[str] | None = None
        self._made = False

    def take(self) -> None:
        """Make the folder and lock it. UserError when somebody else has it, and says who, or when it cannot be made."""
        try:
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot make {self.folder} ({self.what}): {error.strerror}.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                self._refuse(error, _holder(file))
            return
        self._file = file
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()

    def _refuse(self, error: OSError, holder: str) -> None:
        if error.errno in NO_LOCKS:
            warnings.warn(
                f"{self.folder} lies on a file system without locks: nothing keeps two runs out of it.", stacklevel=4
            )
            return
        raise UserError(
            f"{self.folder} is in use by another run{holder}, or by one that it left behind. Wait for it or end it, or name another "
            f"{self.what}."
        ) from None

    def fileno(self) -> int | None:
        """For children that shall hold it too; None where there are no locks."""
        return None if self._file is None else self._file.fileno()

    def release(self, *, tidy: bool = False) -> None:
        """Once is enough. `tidy`: a folder that was made for the lock and holds nothing else goes with it; not where children hold it too."""
        if self._file is None:
            return
        if tidy and self._made and [path.name for path in self.folder.iterdir()] == [LOCK]:
            (self.folder / LOCK).unlink()
            self.folder.rmdir()
        self._file.close()
        self._file = None


def _holder(file: IO[str]) -> str:
    file.seek(0)
    said = file.read(200).strip()
    return f" ({said})" if said else ""
