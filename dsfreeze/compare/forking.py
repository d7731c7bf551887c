"""Runs that are forked from a process which has imported what they need, so that small ones do not each begin with torch and transformers.
For Linux without GPUs, since CUDA does not survive a fork. No torch on our side.

    python -m dsfreeze.compare.forking         the server; its standard input is a socket of ours

A message is the run's words and what its environment has beyond the server's; three file descriptors go with it: where its output
goes, where the server writes its process id and then its exit code, and a lock that the run holds as long as it lives.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, NoReturn

#: What runs import, and through it nearly all of what they use.
PRELOAD = ("dsfreeze.cli", "dsfreeze.loop", "transformers.generation.utils")
#: Process descriptors, and sockets that keep messages apart, are Linux's.
POSSIBLE = sys.platform == "linux"
#: Bytes of a message: some words, some variables.
_MOST = 1 << 16


class ForkServer:
    """Starts runs, the server with the first of them; its own output goes to the file `log`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.channel: socket.socket | None = None

    def launch(self, command: Sequence[str], log: IO[str], lock: int | None, environment: Mapping[str, str]) -> Forked:
        """What a `subprocess.Popen` of `python -m dsfreeze WORDS` does, in a session of its own."""
        ours, theirs = os.pipe()
        more = {name: value for name, value in environment.items() if os.environ.get(name) != value}
        message = json.dumps([list(command[3:]), more]).encode()
        try:
            self._send(message, [log.fileno(), theirs, *([] if lock is None else [lock])])
        finally:
            os.close(theirs)
        return Forked(ours)

    def _send(self, message: bytes, descriptors: list[int]) -> None:
        if self.channel is not None:
            try:
                socket.send_fds(self.channel, [message], descriptors)
            except (BrokenPipeError, ConnectionResetError):  # the server has been killed
                self.close()
            else:
                return
        self.channel = self._started()
        socket.send_fds(self.channel, [message], descriptors)

    def _started(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self.log.open("w", encoding="utf-8") as log:
            subprocess.Popen(
                [sys.executable, "-m", "dsfreeze.compare.forking"], stdin=theirs.fileno(), stdout=log, stderr=log,
                start_new_session=True, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            )  # fmt: skip
        return ours

    def close(self) -> None:
        """No more runs; the server ends with its last one."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None


class Forked:
    """A run, as `subprocess.Popen` has it; killed with its server, it has ended by SIGKILL."""

    def __init__(self, told: int) -> None:
        self.told, self.text = told, b""
        self.code: int | None = None
        os.set_blocking(told, False)

    def poll(self) -> int | None:
        while self.code is None and (read := self._read()) is not None:
            self.text += read
            pid, *codes = self.text.decode().split("\n")[:-1] or [""]
            if codes:
                self._end(int(codes[0]))
            elif not read:
                if pid:
                    _kill(int(pid), signal.SIGKILL)
                self._end(-signal.SIGKILL)
        return self.code

    def terminate(self) -> None:
        while self.poll() is None and b"\n" not in self.text:
            self._wait()
        if self.code is None:
            _kill(int(self.text.split(b"\n")[0]), signal.SIGTERM)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            self._wait()
        return code

    def _read(self) -> bytes | None:
        try:
            return os.read(self.told, _MOST)
        except BlockingIOError:
            return None

    def _wait(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.told, selectors.EVENT_READ)
            selector.select()

    def _end(self, code: int) -> None:
        self.code = code
        os.close(self.told)


def _kill(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, number)


# -- the server ------------------------------------------------------------------------------------------------


class Server:
    """Forks what is asked for, and says how each run ended."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.selector = selectors.DefaultSelector()

    def serve(self) -> None:
        """Until nobody asks and no run is left."""
        self.selector.register(self.channel, selectors.EVENT_READ)
        while self.selector.get_map():
            for key, _ in self.selector.select():
                if key.fileobj is self.channel:
                    self._receive()
                else:
                    self._reap(key.fd, *key.data)

    def _receive(self) -> None:
        message, descriptors, _, _ = socket.recv_fds(self.channel, _MOST, 3)
        if not message:
            self.selector.unregister(self.channel)
            return
        log, told, *lock = descriptors
        pid = os.fork()
        if pid == 0:
            self._forget(told)
            _run(message, log)
        _write(told, pid)
        for descriptor in (log, *lock):
            os.close(descriptor)
        self.selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, told))

    def _reap(self, handle: int, pid: int, told: int) -> None:
        self.selector.unregister(handle)
        _, status = os.waitpid(pid, 0)
        _write(told, os.waitstatus_to_exitcode(status))
        os.close(handle)
        os.close(told)

    def _forget(self, told: int) -> None:
        """In a run's process: close what is the server's, so that its death is seen."""
        for key in list(self.selector.get_map().values()):
            for descriptor in (key.fd, *(key.data or ())[1:]):
                os.close(descriptor)
        os.close(told)
        self.selector.close()


def _write(told: int, number: int) -> None:
    with suppress(BrokenPipeError):  # who asked has been killed; the run goes on
        os.write(told, f"{number}\n".encode())


def _run(message: bytes, log: int) -> NoReturn:
    words, environment = json.loads(message)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for ours, theirs in ((0, nothing), (1, log), (2, log)):
        os.dup2(theirs, ours)
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):  # which OpenMP read when the server loaded it
        import_module("torch").set_num_threads(int(threads))
    sys.exit(import_module("dsfreeze.cli").run(words))


def main() -> None:
    """The server's process."""
    for name in PRELOAD:
        import_module(name)
    Server(socket.socket(fileno=os.dup(sys.stdin.fileno()))).serve()


if __name__ == "__main__":
    main()
