"""Two hosts on one machine: namespaces of network, names, mounts and processes, a cable between them, sshd on each. Root alone may make them.

They share the machine's files, as hosts of a cluster share a file system. Nothing outside of the namespaces is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from launch_kit import ROOT, write_program

NAMES = ("dsfreeze-a", "dsfreeze-b")
PROGRAMS = ("ip", "ssh", "ssh-keygen", "sshd", "pdsh", "unshare", "nsenter")
_SECONDS = 20
#: Where system programs lie too, on some users' paths or not.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def why_not() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if os.geteuid() != 0:
        return "only root makes hosts"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]:
        return f"hosts need {', '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False, env=_environment(),
    )  # fmt: skip
    return f"namespaces are not permitted: {tried.stderr.strip()}" if tried.returncode else None


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _PATH}


class Host:
    """A namespace's first process, and how to run something in there."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        script = write_program(
            folder / f"{name}.sh", "set -e", f"hostname {name}", f"mount --bind {folder / 'hosts'} /etc/hosts", "mount -t tmpfs none /run",
            "mkdir -p /run/sshd", "ip link set lo up", f"while ! ip addr show {name[-6:]} >/dev/null 2>&1; do sleep 0.05; done",
            f"ip addr add {address}/24 dev {name[-6:]}", f"ip link set {name[-6:]} up", f"exec $(command -v sshd) -D -e -f {folder / 'sshd_config'}",
        )  # fmt: skip
        self.outer = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", str(script)],
            stdin=subprocess.DEVNULL, stderr=(folder / f"{name}.log").open("w"), env=_environment(),
        )  # fmt: skip
        self.pid = _first_child(self.outer.pid)
        #: Keeps the network when the host is killed: the cable would go with it, and the other host's address.
        self.network = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)

    @property
    def inside(self) -> list[str]:
        """Words before a command that is to run on this host, in the repository."""
        return [
            "nsenter",
            "--target",
            str(self.pid),
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "--",
            "env",
            f"--chdir={ROOT}",
        ]

    def pull_the_plug(self) -> None:
        """Nothing reaches it any more, and nothing of it anybody; it goes on."""
        subprocess.run([*self.inside, "ip", "link", "set", self.name[-6:], "down"], check=True, env=_environment())

    def kill(self) -> None:
        """All of its processes, at once."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        self.outer.wait(_SECONDS)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Hosts that reach each other by name and by ssh without a password. `folder`: of our own, for keys and settings."""
    folder.mkdir(parents=True)
    addresses = [f"10.213.77.{number}" for number in (1, 2)]
    (folder / "hosts").write_text(
        "".join(f"{a} {n}\n" for a, n in zip(addresses, NAMES, strict=True)) + "127.0.0.1 localhost\n"
    )
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"HostKey {folder / 'host_key'}\nAuthorizedKeysFile {folder / 'authorized_keys'}\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PermitRootLogin prohibit-password\nMaxStartups 100\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder / 'user_key'}\nIdentitiesOnly yes\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        "ServerAliveInterval 5\nServerAliveCountMax 3\n"
    )
    write_program(folder / "bin" / "ssh", f'exec {shutil.which("ssh")} -F {folder / "ssh_config"} "$@"')
    hosts: list[Host] = []
    try:
        for name, address in zip(NAMES, addresses, strict=True):
            hosts.append(Host(name, address, folder))
        first, second = hosts
        cable = [name[-6:] for name in NAMES]
        subprocess.run(
            ["ip", "link", "add", cable[0], "netns", str(first.pid), "type", "veth", "peer", "name", cable[1], "netns", str(second.pid)],
            check=True, env=_environment(),
        )  # fmt: skip
        _wait_for_ssh(first, second, folder)
        yield first, second
    finally:
        for host in hosts:
            host.kill()
            os.close(host.network)


def _first_child(pid: int) -> int:
    deadline = time.monotonic() + _SECONDS
    while not (children := psutil.Process(pid).children()):
        assert time.monotonic() < deadline, "no host was made"
        time.sleep(0.01)
    return children[0].pid


def _wait_for_ssh(first: Host, second: Host, folder: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    for host in (first, second):
        command = [*first.inside, str(folder / "bin" / "ssh"), host.name, "hostname"]
        while (
            done := subprocess.run(command, capture_output=True, text=True, check=False)
        ).stdout.strip() != host.name:
            assert time.monotonic() < deadline, done.stderr + (folder / f"{host.name}.log").read_text()
            time.sleep(0.1)
