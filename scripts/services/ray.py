"""A real Ray on this machine: a head and N nodes, each with a loopback address and processes of its own, behind a token.

    python scripts/services/ray.py up DIR [NODES]    # start (or find running) the head and nodes n1 ... nN; prints exports
    eval "$(python scripts/services/ray.py up DIR)"  # ... and sets them, after which ray, Ray Jobs and ray.init() work
    python scripts/services/ray.py kill DIR NODE     # end a node as a power cut does, with all that runs on it
    python scripts/services/ray.py start DIR NODE    # start a node (again); any name will do, and it joins the cluster
    python scripts/services/ray.py down DIR          # end everything by process id

The head holds no CPUs, so that it runs the drivers of jobs and no more, and losing a node never loses a driver. DIR holds
the token (mode 600), the ports and the logs of the start; Ray's own folder lies below the one for temporary files, since
the paths of its sockets must be short. Read when DIR is made: KEEL_RAY_CPUS, CPUs of each node (default 2; more than there
are is fine).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120.0
# Every process of the cluster inherits these two, those that jobs start included: that is how they are found again.
SERVICE, NODE = "KEEL_RAY_SERVICE", "KEEL_RAY_NODE"
HEAD = "head"


def environment(folder: Path, state: dict[str, Any]) -> dict[str, str]:
    """The variables with which Ray's clients find the cluster and are let in."""
    head = f"{state['network']}.1"
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_ADDRESS": f"{head}:{state['gcs']}",
        "RAY_API_SERVER_ADDRESS": f"http://{head}:{state['dashboard']}",
        # A proxy of the network outside must not see requests to this host.
        "NO_PROXY": _with(os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")), head),
        "no_proxy": _with(os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")), head),
    }


def up(directory: str | Path, nodes: int = 0) -> dict[str, str]:
    """Starts the cluster (or what is missing of it) and returns the environment for its clients. `nodes`: 0 means those
    that the directory is made for, or two.

    Raises:
        RuntimeError: it did not come up; the message names the log.
    """
    folder = Path(directory).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    state = _state(folder) or _make(folder, nodes or 2)
    names = [f"n{number}" for number in range(1, (nodes or state["nodes"]) + 1)]
    if HEAD not in _running(folder):
        shutil.rmtree(state["temp"], ignore_errors=True)  # a head cannot take over the session of another
        _start(folder, state, HEAD)
    for name in names:  # one after the other: nodes of one machine choose the names of their sockets by what is there
        if name not in _running(folder):
            _start(folder, state, name)
    deadline = time.monotonic() + START_TIMEOUT_S
    wanted = {f"{state['network']}.{state['addresses'][name]}" for name in names}
    while not wanted <= _alive(folder, state):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the nodes do not register; the logs: {state['temp']}/session_latest/logs")
        time.sleep(0.2)
    return environment(folder, state)


def start(directory: str | Path, node: str) -> None:
    """Starts one node more, or one that was killed; returns when its processes run.

    Raises:
        RuntimeError: there is no cluster, or the node did not start.
    """
    folder = Path(directory).resolve()
    state = _state(folder)
    if state is None or HEAD not in _running(folder):
        raise RuntimeError(f"no cluster runs in {folder}")
    if node not in _running(folder):
        _start(folder, state, node)


def kill(directory: str | Path, node: str) -> None:
    """Ends a node and all that runs on it at once.

    Raises:
        RuntimeError: it does not run.
    """
    folder = Path(directory).resolve()
    if node not in _running(folder):
        raise RuntimeError(f"node {node} does not run")
    _end(folder, node)


def down(directory: str | Path) -> bool:
    """Ends all processes of the cluster. False: none was running."""
    folder = Path(directory).resolve()
    found = bool(_running(folder))
    _end(folder)
    if state := _state(folder):
        shutil.rmtree(state["temp"], ignore_errors=True)
    return found


def _make(folder: Path, nodes: int) -> dict[str, Any]:
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    network = f"127.{random.randrange(16, 255)}.{random.randrange(1, 255)}"
    ports = iter(_free_ports(3))
    state = {
        "network": network,
        "gcs": next(ports),
        "dashboard": next(ports),
        "client": next(ports),
        "temp": tempfile.mkdtemp(prefix="keel-ray-"),
        "nodes": nodes,
        "addresses": {HEAD: 1},
        "cpus": int(os.environ.get("KEEL_RAY_CPUS", "2")),
    }
    _write(folder, state)
    return state


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the kernel gives to outgoing connections."""
    found: list[int] = []
    with contextlib.ExitStack() as held:  # kept open, so that no port is found twice
        while len(found) < count:
            probe, port = held.enter_context(socket.socket()), random.randrange(10000, 15000)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                found.append(port)
    return found


def _start(folder: Path, state: dict[str, Any], name: str) -> None:
    """Starts a node's processes; returns when they run."""
    known = state["addresses"]
    if name not in known:
        known[name] = max(known.values()) + 1
        _write(folder, state)
    address = f"{state['network']}.{known[name]}"
    words = ["--node-ip-address", address, "--num-gpus", "0", "--object-store-memory", str(100 << 20)]
    words += ["--disable-usage-stats", "--include-log-monitor", "false", "--min-worker-port", "0"]
    words += ["--max-worker-port", "0"]
    # By default every agent, whatever its node's address, takes one port of 127.0.0.1: no second cluster would run jobs.
    words += ["--dashboard-agent-listen-port", str(_free_ports(1)[0])]
    head = f"{state['network']}.1"
    if name == HEAD:
        words += ["--head", "--num-cpus", "0", "--port", str(state["gcs"]), "--temp-dir", state["temp"]]
        words += ["--dashboard-host", address, "--dashboard-port", str(state["dashboard"])]
        words += ["--ray-client-server-port", str(state["client"])]
    else:
        words += ["--address", f"{head}:{state['gcs']}", "--num-cpus", str(state["cpus"])]
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    settings = {
        **{name: value for name, value in environment(folder, state).items() if "ADDRESS" not in name},
        # A node that is gone refuses the connection, and is soon dead; one on a busy machine may be slow to answer.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "30000",
        "RAY_health_check_failure_threshold": "5",
        "RAY_memory_monitor_refresh_ms": "0",  # the machine may be full for other reasons
        "RAY_prestart_worker_first_driver": "0",  # not one idle process for each CPU
        "RAY_worker_niceness": "0",  # what runs beside it on this machine must not starve it
        SERVICE: str(folder),
        NODE: name,
    }
    log = folder / f"{name}.log"
    for _ in range(3):
        with log.open("ab") as sink:
            starter = subprocess.Popen(
                [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *words],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=folder,
                env=own | settings,
                preexec_fn=_hurry,
            )
        (folder / f"{name}.session").write_text(str(starter.pid))
        # Ray itself gives up after 30 s, and leaves its processes; on a busy machine these may only need longer.
        with contextlib.suppress(subprocess.TimeoutExpired):
            if starter.wait(START_TIMEOUT_S) == 0:
                return
        deadline = time.monotonic() + START_TIMEOUT_S
        while name in _running(folder) and time.monotonic() < deadline:
            if address in _alive(folder, state):
                return
            time.sleep(0.5)
        _end(folder, name)
        starter.wait()
    raise RuntimeError(f"{name} did not start; its log: {log}")


def _hurry() -> None:
    """Ray gives its daemons 15 s to start, which on a busy machine takes priority. Workers of jobs stay behind (nice 15)."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)


def _alive(folder: Path, state: dict[str, Any]) -> set[str]:
    """Addresses of the nodes that the cluster knows to be alive."""
    url = f"{environment(folder, state)['RAY_API_SERVER_ADDRESS']}/api/v0/nodes?detail=1&limit=1000"
    token = (folder / "token").read_text()
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            rows = json.load(response)["data"]["result"]["result"]
    except (OSError, ValueError):
        return set()
    return {row["node_ip"] for row in rows if row["state"] == "ALIVE"}


def _processes(folder: Path) -> Iterator[tuple[int, str]]:
    """(process id, node) of all that runs on the cluster: of the session of a node's start, or with its mark. Ray's own
    processes write their titles over what they inherited, and what a job starts may have a session of its own."""
    sessions = {int(path.read_text()): path.stem for path in folder.glob("*.session")}
    mark, prefix = f"{SERVICE}={folder}".encode(), f"{NODE}=".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            settings = (path / "environ").read_bytes().split(b"\0")
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes()
        except OSError:  # it has ended, or is not ours
            continue
        named = [setting[len(prefix) :].decode() for setting in settings if setting.startswith(prefix)]
        if fields[0] == "Z":
            continue
        if int(fields[3]) in sessions and b"ray" in command:
            yield int(path.name), sessions[int(fields[3])]
        elif mark in settings and named:
            yield int(path.name), named[0]


def _running(folder: Path) -> set[str]:
    """The nodes whose raylet runs."""
    found = set()
    for pid, node in _processes(folder):
        with contextlib.suppress(OSError):
            if b"/raylet/raylet\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(node)
    return found


def _end(folder: Path, node: str = "") -> None:
    """Kills what runs on a node, or on all; what such a process starts meanwhile, too."""
    while left := [pid for pid, owner in _processes(folder) if node in ("", owner)]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _state(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / "state.json").read_text())
        return found
    except (OSError, json.JSONDecodeError):
        return None


def _write(folder: Path, state: dict[str, Any]) -> None:
    part = folder / "state.json.part"
    part.write_text(json.dumps(state))
    part.replace(folder / "state.json")


def _with(hosts: str, *more: str) -> str:
    listed = [host for host in hosts.split(",") if host]
    return ",".join(listed + [host for host in more if host not in listed])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ray.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("action", choices=["up", "kill", "start", "down"])
    parser.add_argument("dir", metavar="DIR", help="where the cluster's token, ports and logs lie")
    parser.add_argument("node", metavar="NODES or NODE", nargs="?", default="", help="how many, or the name of one")
    args = parser.parse_args(argv)
    if args.action == "up" and not (args.node or "2").isdigit():
        parser.error(f"NODES={args.node}: must be a number")
    if args.action in ("kill", "start") and not args.node:
        parser.error(f"{args.action} needs the name of a node")
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != here]  # where this file would pass for Ray
    if importlib.util.find_spec("ray") is None:
        print("ray.py: error: Ray is not installed: pip install 'keel[ray]'", file=sys.stderr)
        return 3
    try:
        if args.action == "up":
            for key, value in up(args.dir, int(args.node or 0)).items():
                print(f"export {key}={value}")
        elif args.action == "down":
            print("stopped" if down(args.dir) else "no cluster was running")
        else:
            (kill if args.action == "kill" else start)(args.dir, args.node)
    except RuntimeError as error:
        print(f"ray.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
