"""The command that every backend starts once per node.

Backends tell the node where it stands by its environment, so that the command is the same on all of them:

    KEEL_NODE             0 .. nodes - 1; 0 is the node that listens (default 0)
    KEEL_RENDEZVOUS       HOST:PORT of node 0, as the other nodes reach it (not needed for one node)
    KEEL_JOB              the job's id, for those who read the status
    KEEL_ARRAY_INDEX      the task of an array
    KEEL_PROGRESS_CODE    exit code in place of 69 and 74 where the run has a new commit since this start of the node, for
                          a backend that cannot ask the store itself
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.launch.spec import JobSpec

if TYPE_CHECKING:
    from cluster.launch.cluster_config import ClusterConfig

NODE, RENDEZVOUS, JOB_ID, ARRAY_INDEX = "KEEL_NODE", "KEEL_RENDEZVOUS", "KEEL_JOB", "KEEL_ARRAY_INDEX"
PROGRESS_CODE = "KEEL_PROGRESS_CODE"
CODE_CACHE = "KEEL_CODE_CACHE"  # folder for unpacked snapshots; default: in the folder for temporary files
_NODE = "cluster.launch.node"

# Runs on a node where Keel may not be installed, only what it needs (fsspec, and s3fs for s3://). The archive is checked,
# unpacked under its own digest, moved into place at once, and the node starts from there.
BOOTSTRAP = """\
import hashlib, io, os, shutil, signal, sys, tarfile, tempfile, time
for told in (signal.SIGTERM, signal.SIGUSR1):  # nothing is lost, and as process 1 it would hear nothing
    signal.signal(told, lambda *_: sys.exit(75))
url, digest, args = sys.argv[1], sys.argv[2], sys.argv[3:]
home = os.environ.get("KEEL_CODE_CACHE") or os.path.join(tempfile.gettempdir(), "keel-code-%d" % os.getuid())
code = os.path.join(home, digest)
for attempt in range(5):
    if os.path.isdir(code):
        break
    try:
        import fsspec
        with fsspec.open(url, "rb") as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != digest:
            raise OSError("its checksum is wrong")
        os.makedirs(home, mode=0o700, exist_ok=True)
        part = tempfile.mkdtemp(dir=home)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(part, filter="data")
        try:
            os.rename(part, code)
        except OSError:
            shutil.rmtree(part)
    except Exception as error:
        kind = type(error).__name__
        if attempt == 4 or isinstance(error, (FileNotFoundError, PermissionError, ImportError)) or "Credentials" in kind:
            sys.exit("keel: error: %s: the code cannot be fetched (%s: %s)" % (url, kind, error))
        time.sleep(2 ** attempt)
if os.stat(home).st_uid != os.getuid():
    sys.exit("keel: error: %s belongs to somebody else; set KEEL_CODE_CACHE" % home)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
os.execv(sys.executable, [sys.executable, "-P", "-m", "cluster.launch.node", *args])
"""


def node_command(
    spec: JobSpec, cluster: ClusterConfig, *, python: str = "", time_limit_s: float | None = None
) -> list[str]:
    """The command line of one node, the same on all: words, not yet quoted for a shell. `time_limit_s`: after this long the
    node itself tells its workers to save and end, where the backend does not.

    With `code.how=path` it needs PYTHONPATH to begin with `code.where` (see `node_environment`).
    """
    interpreter = cluster.python or python or "python"
    nodes = f"{spec.nodes}:{spec.max_nodes}" if spec.max_nodes > spec.nodes else str(spec.nodes)
    arguments = ["--run", spec.run_url, "--nodes", nodes, "--processes", str(spec.processes)]
    arguments += ["--restarts", str(spec.retries), "--heartbeat", f"{cluster.heartbeat_s:g}"]
    arguments += ["--grace", f"{cluster.grace_s:g}"]
    arguments += [] if time_limit_s is None else ["--time-limit", f"{time_limit_s:g}"]
    if spec.nodes > 1 or spec.max_nodes > 1:
        rendezvous = cluster.rendezvous
        arguments += ["--join-timeout", f"{rendezvous.join_timeout_s:g}", "--lost", f"{rendezvous.lost_s:g}"]
    return module_command(spec, interpreter, _NODE, [*arguments, "--", *spec.command])


def module_command(spec: JobSpec, interpreter: str, module: str, arguments: Sequence[str]) -> list[str]:
    """The command line of a module of Keel, with the code from where the spec says."""
    if spec.code.how == "snapshot":
        bootstrap = BOOTSTRAP.replace(_NODE, module)
        return [interpreter, "-P", "-c", bootstrap, spec.code.where, spec.code.digest, *arguments]
    return [interpreter, "-P", "-m", module, *arguments]


def node_environment(spec: JobSpec) -> dict[str, str]:
    """What the command's environment must hold besides the variables of this module; no secrets."""
    path = {"PYTHONPATH": spec.code.where} if spec.code.how == "path" else {}
    return {**path, **spec.env}
