"""A few machines as far as the network goes: namespaces with addresses of their own, wired to this one by a bridge."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

_serial = itertools.count()


def missing() -> str:
    """Why no network can be made here; "" if one can."""
    if shutil.which("ip") is None:
        return "tests of two machines need the command ip: apt-get install iproute2"
    if os.geteuid() != 0:
        return "tests of two machines need root, to make network namespaces"
    done = subprocess.run(["ip", "netns", "add", probe := f"keel{os.getpid()}p"], capture_output=True, text=True)
    if done.returncode:
        return f"tests of two machines need network namespaces: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return ""


class Network:
    """`nodes` namespaces on one bridge; this machine is on it, too. To be used in a `with` statement."""

    def __init__(self, nodes: int) -> None:
        number = (os.getpid() * 7 + next(_serial)) % 250
        self.name = f"kl{os.getpid() % 100000}x{next(_serial)}"
        self.prefix = f"10.213.{number}"
        self.here = f"{self.prefix}.254"
        self.nodes = nodes

    def address(self, node: int) -> str:
        return f"{self.prefix}.{node + 1}"

    def command(self, node: int, words: list[str]) -> list[str]:
        """`words` as they run on a node."""
        return ["ip", "netns", "exec", f"{self.name}n{node}", *words]

    def cut(self, node: int) -> None:
        """Pulls a node's cable."""
        self._ip("link", "set", f"{self.name}v{node}", "down")

    def mend(self, node: int) -> None:
        """Plugs it in again."""
        self._ip("link", "set", f"{self.name}v{node}", "up")

    def __enter__(self) -> Network:
        try:
            self._ip("link", "add", f"{self.name}b", "type", "bridge")
            self._ip("address", "add", f"{self.here}/24", "dev", f"{self.name}b")
            self._ip("link", "set", f"{self.name}b", "up")
            for node in range(self.nodes):
                space, cable = f"{self.name}n{node}", f"{self.name}v{node}"
                # Nobody answers for names here; that must be known at once.
                names = Path("/etc/netns", space)
                names.mkdir(parents=True)
                (names / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
                self._ip("netns", "add", space)
                self._ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
                self._ip("link", "set", cable, "master", f"{self.name}b", "up")
                self._ip("-n", space, "address", "add", f"{self.address(node)}/24", "dev", "eth0")
                self._ip("-n", space, "link", "set", "eth0", "up")
                self._ip("-n", space, "link", "set", "lo", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for node in range(self.nodes):
            shutil.rmtree(f"/etc/netns/{self.name}n{node}", ignore_errors=True)
            for words in (["link", "delete", f"{self.name}v{node}"], ["netns", "delete", f"{self.name}n{node}"]):
                with contextlib.suppress(subprocess.CalledProcessError):
                    self._ip(*words)
        with contextlib.suppress(subprocess.CalledProcessError):
            self._ip("link", "delete", f"{self.name}b")

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)
