"""Jobs on a Slurm cluster: an sbatch script of our own, and the four commands that every Slurm has.

The script starts the node entry once per node (`srun`), tells it where node 0 listens, and maps how it ended to the
queue: 75 (preempted after a save) queues the job again, in its own id. Neither a shared file system nor Slurm's data base
is needed; the submitter's environment stays behind, but for `pass_env` and what a login shell sets.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.launch import EXIT_LOST, EXIT_REQUEUE, EXIT_UNAVAILABLE, EXIT_USER_ERROR, slurm_client
from cluster.launch.entry import PROGRESS_CODE, node_command, node_environment
from cluster.launch.spec import JobSpec, passed

if TYPE_CHECKING:
    from cluster.launch.cluster_config import ClusterConfig

CONTAINERS = ("none", "pyxis", "apptainer")

# What a batch script needs of a login shell, modules included. The rest of it would make a job depend on who submits.
_KEPT = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "SLURM_CONF", "MODULEPATH", "MODULESHOME", "LOADEDMODULES")
_FOUND_ANYWHERE = re.compile(r"/|[a-z]+:")  # an absolute path, or a registry's docker://...
_KEPT_PREFIXES = ("LMOD_", "BASH_FUNC_")


@dataclass
class Group:
    """Nodes of one kind, where a job needs more than one: the first group holds node 0, which listens and gathers.

    An empty or zero field is that of the whole job."""

    nodes: int = 1
    memory_gib: float = 0.0
    partition: str = ""
    constraint: str = ""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes={self.nodes}: must be at least 1")
        if self.memory_gib < 0:
            raise ValueError(f"memory_gib={self.memory_gib}: must be at least 0")


@dataclass
class SlurmConfig:
    """The section `slurm` of a cluster's config. Empty fields leave the choice to Slurm.

    Attributes:
        partition, account, qos, constraint, reservation, exclude: as in sbatch.
        gres: name under which accelerators are asked for, such as `gpu` or `gpu:a100`.
        exclusive: whole nodes.
        container: how `image` is run: `none`, `pyxis` (srun --container-image) or `apptainer`. Each node's `setup` lines
            run inside the container with pyxis, and before it with apptainer.
        mounts: `host:container` folders for it, besides that of the code with `code.how=path`.
        logs: a folder that exists on every node, shared or not. It gets keel-JOB.log (the script) and keel-JOB-nodeN.log.
        signal_s: so long before the time limit the run is told to save (0: the cluster's `grace_s`). Slurm looks only every
            30 s, and may tell it half a minute earlier.
        groups: nodes that differ in memory or kind; their numbers add up to the job's.
        directives: further #SBATCH options, such as `--switches=1`.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    exclude: str = ""
    gres: str = "gpu"
    exclusive: bool = False
    container: str = "none"
    mounts: list[str] = field(default_factory=list)
    logs: str = "/tmp"
    signal_s: int = 0
    groups: list[Group] = field(default_factory=list)
    directives: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.container not in CONTAINERS:
            raise ValueError(f"container={self.container}: must be one of {', '.join(CONTAINERS)}")
        if self.mounts and self.container == "none":
            raise ValueError(
                "mounts have no effect with container=none; drop them, or set container=pyxis or apptainer"
            )
        if not self.logs.startswith("/") or any(c.isspace() or c in "%\\" for c in self.logs):
            raise ValueError(f"logs={self.logs}: must be an absolute path without spaces, % and \\")
        if self.signal_s < 0:
            raise ValueError(f"signal_s={self.signal_s}: must be at least 0")
        for line in self.directives:
            if not line.startswith("-") or "\n" in line:
                raise ValueError(f"directives: {line!r} is no sbatch option, such as --switches=1")
            if line.startswith("--comment"):
                raise ValueError(f"directives: {line!r}: a job's comment tells which run it is of; drop it")


class Slurm:
    """See `cluster.launch.base.Backend`."""

    Config = SlurmConfig

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self.options: SlurmConfig = cluster.options

    def render(self, spec: JobSpec) -> str:
        """The sbatch script of `spec`. Pure.

        Raises:
            ValueError: a job that Slurm does not have.
        """
        self._refuse(spec)
        sections = [
            "#!/bin/bash",
            self._directives(spec),
            self._environment(spec),
            self._step(spec),
            _end(spec),
        ]
        return "\n".join(sections)

    def check(self, spec: JobSpec) -> None:
        """Raises ValueError or OSError where Slurm would refuse the job, or keep it waiting for ever."""
        self._refuse(spec)
        passed(spec, os.environ)
        if spec.image.startswith("/") and os.path.isdir(os.path.dirname(spec.image)) and not os.path.exists(spec.image):
            raise ValueError(f"image={spec.image}: no such file")
        for job in spec.after:  # one that it does not know Slurm takes for one that ended well
            if slurm_client.state(job) == "unknown":
                raise ValueError(f"after={job}: Slurm knows no such job (any more); drop it if that has ended well")
        for group in self._groups(spec):
            slurm_client.check_nodes(
                group.partition,
                nodes=group.nodes,
                cpus=spec.cpus_per_node,
                memory_mib=_mib(group.memory_gib),
                accelerators=(self.options.gres, spec.accelerators),
                minutes=_minutes(spec.time_limit_s),
            )

    def submit(self, spec: JobSpec) -> str:
        """Queues a job that was checked, and returns Slurm's id of it."""
        environment = {
            name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)
        }
        return slurm_client.submit(self.render(spec), environment | passed(spec, os.environ))

    def state(self, job_id: str) -> str:
        return slurm_client.state(job_id)

    def owns(self, job_id: str, run_url: str) -> bool:
        comments = slurm_client.comments(job_id)
        return not comments or run_url in comments

    def cancel(self, job_id: str) -> None:
        slurm_client.cancel(job_id)

    def logs(self, job_id: str, node: int) -> Iterator[str]:
        """Lines of the node's log where this machine sees the folder `logs`; else none. `job_id` of an array's task is
        JOB_TASK."""
        try:
            with open(f"{self.options.logs}/keel-{job_id}-node{node}.log", errors="replace") as file:
                for line in file:
                    yield line.rstrip("\n")
        except FileNotFoundError:
            return

    # ------------------------------------------------------------------------------------------------------ rendering
    def _refuse(self, spec: JobSpec) -> None:
        options = self.options
        if spec.max_nodes > spec.nodes:
            raise ValueError(
                f"max_nodes={spec.max_nodes}: a Slurm job keeps its number of nodes; drop it, or use backend=ray"
            )
        if spec.image and options.container == "none":
            raise ValueError(
                f"image={spec.image} has no effect with slurm.container=none; set it to pyxis or apptainer"
            )
        if options.container != "none" and not spec.image:
            raise ValueError(f"slurm.container={options.container} needs image=..., the image to run")
        if spec.image.startswith(".") or (options.container == "apptainer" and not _FOUND_ANYWHERE.match(spec.image)):
            raise ValueError(f"image={spec.image}: a file needs its absolute path, since nodes start elsewhere")
        if options.groups:
            total = sum(group.nodes for group in options.groups)
            if total != spec.nodes:
                raise ValueError(f"slurm.groups have {total} nodes, but the job has nodes={spec.nodes}")
            if spec.array:
                raise ValueError("slurm.groups: Slurm has no arrays of heterogeneous jobs; drop one of them")

    def _groups(self, spec: JobSpec) -> list[Group]:
        options = self.options
        whole = Group(spec.nodes, spec.memory_gib, options.partition, options.constraint)
        return [
            Group(
                nodes=group.nodes,
                memory_gib=group.memory_gib or whole.memory_gib,
                partition=group.partition or whole.partition,
                constraint=group.constraint or whole.constraint,
            )
            for group in options.groups
        ] or [whole]

    def _directives(self, spec: JobSpec) -> str:
        options = self.options
        log = f"{options.logs}/keel-{'%A_%a' if spec.array else '%j'}.log"
        common = {
            "job-name": spec.name,
            "comment": spec.run_url,
            "chdir": options.logs,
            "output": log,
            "open-mode": "append",  # a job that was queued again goes on in the same file
            "export": "ALL",  # of what `submit` lets through
        }
        if spec.time_limit_s is not None:
            limit = _minutes(spec.time_limit_s)
            ahead = min(options.signal_s or math.ceil(self.cluster.grace_s), limit * 60 // 2)
            common |= {"time": str(limit), "signal": f"B:USR1@{ahead}"}
        if spec.array:
            common["array"] = f"0-{spec.array - 1}"
        if spec.after:
            common["dependency"] = "afterok:" + ":".join(spec.after)
            common["kill-on-invalid-dep"] = "yes"  # and not wait for ever when one of them has failed
        for name in ("account", "qos", "reservation"):
            common[name] = getattr(options, name)
        lines = [f"--{name}={value}" for name, value in common.items() if value]
        lines += ["--requeue" if spec.requeue else "--no-requeue", *options.directives]
        groups = self._groups(spec)
        for group in groups:
            if group is not groups[0]:
                lines.append("hetjob")
            values = {
                "partition": group.partition,
                "nodes": str(group.nodes),
                "ntasks-per-node": "1",
                "cpus-per-task": str(spec.cpus_per_node),
                "mem": f"{_mib(group.memory_gib)}M" if group.memory_gib else "",
                "gres": f"{options.gres}:{spec.accelerators}" if spec.accelerators else "",
                "constraint": group.constraint,
                "exclude": options.exclude,
            }
            lines += [f"--{name}={value}" for name, value in values.items() if value]
            lines += ["--exclusive"] if options.exclusive else []
        return "\n".join(f"#SBATCH {_directive(line)}" for line in lines) + "\n"

    def _environment(self, spec: JobSpec) -> str:
        lines = [f"export {name}={shlex.quote(value)}" for name, value in node_environment(spec).items()]
        if spec.array:
            lines += ['export KEEL_JOB="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"']
            lines += ['export KEEL_ARRAY_INDEX="$SLURM_ARRAY_TASK_ID"']
        else:
            lines += ['export KEEL_JOB="$SLURM_JOB_ID"']
        if spec.requeue:
            lines += [f"export {PROGRESS_CODE}={_PROGRESS}"]
        if spec.nodes > 1:
            port = (
                self.cluster.rendezvous.port or "$((15000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 15000))"
            )
            lines += [_ADDRESS.rstrip("\n"), f'export KEEL_RENDEZVOUS="$address:{port}"']
        return "\n".join(lines) + "\n"

    def _step(self, spec: JobSpec) -> str:
        options = self.options
        words = ["srun", f"--nodes={spec.nodes}", f"--ntasks={spec.nodes}", "--ntasks-per-node=1"]
        if options.groups:
            words = ["srun", f"--het-group=0-{len(options.groups) - 1}"]
        words += [f"--cpus-per-task={spec.cpus_per_node}", "--export=ALL"]
        # A node that has ended may not take the others with it: one of them may still be committing.
        words += ["--kill-on-bad-exit=0", f"--wait={math.ceil(self.cluster.grace_s)}"]
        inner: list[str] = []
        shared = [f"{spec.code.where}:{spec.code.where}"] if spec.code.how == "path" else []
        if options.container == "pyxis":
            mounts = ",".join([f"{options.logs}:{options.logs}", *shared, *options.mounts])
            words += [f"--container-image={spec.image}", f"--container-mounts={mounts}"]
        elif options.container == "apptainer":
            mounts = ",".join([*shared, *options.mounts])
            inner = ["apptainer", "exec"] + (["--nv"] if spec.accelerators else [])
            inner += (["--bind", mounts] if mounts else []) + [spec.image]
        command = [*inner, *node_command(spec, self.cluster)]
        # By the node itself: srun's own patterns give parts of a job of several groups the wrong numbers.
        log = f'exec >>{shlex.quote(options.logs)}/keel-"$KEEL_JOB-node$SLURM_PROCID".log 2>&1'
        node = "\n".join([log, *self.cluster.setup, 'export KEEL_NODE="$SLURM_PROCID"', 'exec "$@"'])
        start = f"{shlex.join(words)} bash -c {shlex.quote(node)} node \\\n    {shlex.join(command)} &"
        early = '[[ -z "$told$cancelled" ]] || save'
        return f"{_TRAPS}\n{_BEGUN if spec.requeue else ''}{start}\nstep=$!\n{early}\n"


# The address that Slurm itself uses: the nodes' names need not resolve.
_ADDRESS = """\
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')"
"""

# USR1 comes before the time limit, or by hand: save, and again. USR2 comes from `keel cancel`: save, and no more. To the
# nodes both are USR1, which srun passes on; a TERM would make it kill them.
_TRAPS = """\
told='' cancelled='' step=''
save() { if [[ -n "$step" ]]; then kill -USR1 "$step"; fi; }
trap 'told=1; save' USR1
trap 'cancelled=1; save' USR2
trap 'save' TERM
"""

# What a node that was lost after a new commit ends with, here.
_PROGRESS = 77

# How often it was lost without a new commit. Only the job's comment outlives a requeue.
_BEGUN = f"""\
lost="$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.*{slurm_client.LOST}\\([0-9]*\\).*/\\1/p' | head -n 1)"
begun="$(stat -Lc %s /proc/$$/fd/2)"
"""

_WAIT = """\
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
"""

# Whoever queues a job again must not meet one that Slurm is ending itself: that one it has cancelled, or queues again.
_RUNNING = """\
running() { scontrol show job -o "$SLURM_JOB_ID" | grep -q ' JobState=RUNNING '; }
if [[ -n "$cancelled" ]] && running; then scancel "$SLURM_JOB_ID"; fi
"""


def _end(spec: JobSpec) -> str:
    """What becomes of the job when its nodes have ended."""
    again = f"""\
# srun ends with the largest code of all nodes, and tells each of them in this job's log.
ended() {{ [[ -f /proc/$$/fd/2 ]] && tail -c "+$((begun + 1))" /proc/$$/fd/2 | grep -q "Exited with exit code $1$"; }}
note() {{ scontrol update JobId="$SLURM_JOB_ID" Comment={shlex.quote(spec.run_url)}"$1"; }}
if ended {EXIT_USER_ERROR}; then code={EXIT_USER_ERROR}; fi
if ended {_PROGRESS}; then lost=0; fi
if [[ $code == {_PROGRESS} ]]; then code={EXIT_LOST}; fi
if [[ -n "$told" && $code != 0 && $code != {EXIT_USER_ERROR} ]]; then
    code={EXIT_REQUEUE}  # a run that is told to save while it starts cannot answer so; it has lost nothing
elif [[ $code == {EXIT_REQUEUE} && -n "$lost" ]]; then
    note ''
elif [[ $code == {EXIT_LOST} || $code == {EXIT_UNAVAILABLE} ]] || {{ (( code > 128 )) && ! ended "$code"; }}; then
    # Nodes that lost each other or their store, or were killed (one that exits so has seen its workers killed, and started
    # them again) may meet again, but not for ever.
    if (( ${{lost:-0}} < {spec.retries} )); then code={EXIT_REQUEUE}; note "{slurm_client.LOST}$((${{lost:-0}} + 1))"; fi
fi
if [[ $code == {EXIT_REQUEUE} && -z "$cancelled" ]] && running; then scontrol requeue "$SLURM_JOB_ID"; fi
"""
    return f'{_WAIT}\n{_RUNNING}{again if spec.requeue else ""}exit "$code"\n'


def _directive(line: str) -> str:
    # Slurm splits a directive at spaces and takes quotes as a shell does.
    name, separator, value = line.partition("=")
    return f"{name}={shlex.quote(value)}" if separator and shlex.quote(value) != value and " " in value else line


def _mib(gib: float) -> int:
    return math.ceil(gib * 1024)


def _minutes(seconds: float | None) -> int:
    return 0 if seconds is None else math.ceil(seconds / 60)
