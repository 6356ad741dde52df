"""A local S3-compatible server (moto) for the demo and for trying s3:// URLs. It keeps its objects in memory.

    python scripts/services/s3.py up --port 0 --dir .keel/s3     # prints shell exports; port 0 picks a free one
    eval "$(python scripts/services/s3.py up --dir .keel/s3)"    # ... and sets them
    python scripts/services/s3.py down --dir .keel/s3

The server listens on 127.0.0.1 only, holds a bucket `keel`, and takes any credentials. `up` on a directory whose server
still answers prints that server's exports again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

BUCKET = "keel"
START_TIMEOUT_S = 60.0


def environment(endpoint: str) -> dict[str, str]:
    """The variables with which s3fs (through botocore) talks to the server at `endpoint`."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "keel",
        "AWS_SECRET_ACCESS_KEY": "keel-local-only",
        "AWS_DEFAULT_REGION": "us-east-1",
        # A proxy of the network outside must not see requests to this host.
        "NO_PROXY": _with_loopback(os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))),
        "no_proxy": _with_loopback(os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))),
    }


def _with_loopback(hosts: str) -> str:
    listed = [host for host in hosts.split(",") if host]
    return ",".join(listed + [host for host in ("127.0.0.1", "localhost") if host not in listed])


def up(directory: str | Path, port: int = 0) -> dict[str, str]:
    """Starts the server (or finds it running) and returns the environment for its clients.

    Raises:
        RuntimeError: the server did not come up; the message names its log.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = _state(folder)
    if state and _alive(state["pid"]) and _answers(state["endpoint"]):
        return environment(state["endpoint"])
    (folder / "state.json").unlink(missing_ok=True)
    log = folder / "server.log"
    with log.open("w") as sink:
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", "--port", str(port), "--dir", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        state = _state(folder)
        if state and _answers(state["endpoint"]):
            return environment(state["endpoint"])
        time.sleep(0.1)
    server.kill()
    raise RuntimeError(f"the S3 server did not start; its log: {log}")


def down(directory: str | Path) -> bool:
    """Stops the server of `directory`. False: none was running."""
    folder = Path(directory)
    state = _state(folder)
    (folder / "state.json").unlink(missing_ok=True)
    if not state or not _alive(state["pid"]):
        return False
    os.kill(state["pid"], signal.SIGTERM)
    for _ in range(100):
        if not _alive(state["pid"]):
            return True
        time.sleep(0.05)
    os.kill(state["pid"], signal.SIGKILL)
    return True


def serve(directory: str | Path, port: int) -> None:
    """The server itself, in the foreground, until SIGTERM."""
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise SystemExit(f"the local S3 server needs moto: pip install 'moto[server]' ({error})") from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    host, actual_port = server.get_host_and_port()
    endpoint = f"http://{host}:{actual_port}"
    _open(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT"))
    temporary = Path(directory) / "state.json.tmp"
    temporary.write_text(json.dumps({"pid": os.getpid(), "endpoint": endpoint}))
    temporary.replace(Path(directory) / "state.json")
    signal.pause()


def _state(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _alive(pid: int) -> bool:
    """True when `pid` is a live server of ours: a pid alone may have been given to another program since."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        running = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
    return running and b"s3.py" in command and b"serve" in command


def _answers(endpoint: str) -> bool:
    try:
        _open(urllib.request.Request(f"{endpoint}/{BUCKET}", method="HEAD"))
    except (urllib.error.URLError, OSError):
        return False
    return True


def _open(request: urllib.request.Request) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as response:
        response.read()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="s3.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("action", choices=["up", "down", "serve"], help="start, stop, or run in the foreground")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 picks a free one")
    parser.add_argument("--dir", default=".keel/s3", help="where the server's state and log lie")
    args = parser.parse_args(argv)
    if args.action == "serve":
        serve(args.dir, args.port)
    elif args.action == "down":
        print("stopped" if down(args.dir) else "no server was running")
    else:
        try:
            variables = up(args.dir, args.port)
        except RuntimeError as error:
            print(f"s3.py: error: {error}", file=sys.stderr)
            return 1
        for key, value in variables.items():
            print(f"export {key}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
