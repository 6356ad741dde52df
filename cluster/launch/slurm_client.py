"""Slurm's own commands, asked and understood: sbatch, sinfo, squeue, scontrol, scancel, and sacct where it works."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

_TIMEOUT_S = 90  # a Slurm client tries for a minute to find its own configuration

LOST = "#lost="  # in a job's comment, behind the run's URL: how often its nodes were lost

_STATES = {
    "queued": ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
    "running": ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESIZING"),
    "done": ("COMPLETED",),
    "cancelled": ("CANCELLED", "REVOKED"),
}
# Of the states of an array's tasks the first in this order is that of the array.
_ORDER = ("running", "queued", "failed", "cancelled", "done")


class SlurmError(OSError):
    """Slurm cannot be asked, or has refused; one line."""


def check_nodes(
    partition: str,
    *,
    nodes: int,
    cpus: int,
    memory_mib: int,
    accelerators: tuple[str, int],
    minutes: int,
) -> None:
    """Raises ValueError when no `nodes` nodes of the partition ("": the default one) could ever hold such a job, each with
    `cpus` and `memory_mib`, `accelerators` (gres name, number) and a limit of `minutes` (0: none asked for)."""
    rows = [line.split("|") for line in _call("sinfo", "-h", "-e", "-o", "%P|%l|%D|%c|%m|%G|%s").splitlines()]
    default = next((row[0].rstrip("*") for row in rows if row[0].endswith("*")), "")
    known = sorted({row[0].rstrip("*") for row in rows})
    if not partition and not default:
        raise ValueError(f"slurm.partition is required: Slurm has no default; it has {', '.join(known)}")
    partition = partition or default
    for name in partition.split(","):
        if name not in known:
            raise ValueError(f"slurm.partition={name}: Slurm has no such partition, it has {', '.join(known)}")
    mine = [row for row in rows if row[0].rstrip("*") in partition.split(",")]
    limits = [_limit(row[1]) for row in mine]
    if minutes and None not in limits and minutes > max(limit for limit in limits if limit is not None):
        longest = max(limit for limit in limits if limit is not None)
        raise ValueError(f"time={minutes} minutes: partition {partition} allows {longest:g}")
    # Slurm queues a larger job than a partition takes, and never starts it.
    sizes = [row[6].rpartition("-")[2] for row in mine]
    if all(size.isdigit() for size in sizes) and nodes > (most := max(map(int, sizes))):
        raise ValueError(f"nodes={nodes}: partition {partition} takes jobs of at most {most}")
    left = [(int(row[2]), int(row[3].rstrip("+")), int(row[4].rstrip("+")), row[5]) for row in mine]
    _enough(partition, nodes, [row[0] for row in left], "")
    left = [row for row in left if row[1] >= cpus]
    _enough(partition, nodes, [row[0] for row in left], f" with {cpus} CPUs")
    left = [row for row in left if row[2] >= memory_mib]
    _enough(partition, nodes, [row[0] for row in left], f" with {memory_mib / 1024:g} GiB of memory")
    gres, number = accelerators
    if number:
        left = [row for row in left if _gres(row[3], gres) >= number]
        _enough(partition, nodes, [row[0] for row in left], f" with {number} of {gres}")


def submit(script: str, environment: Mapping[str, str]) -> str:
    """Queues a batch script and returns the job's id. The job inherits `environment`.

    Raises:
        SlurmError: it was refused.
    """
    return _call("sbatch", "--parsable", stdin=script, environment=environment).strip().split(";")[0]


def state(job_id: str) -> str:
    """The state of a job, of an array (`12`) or of one of its tasks (`12_3`), as `cluster.launch.base.STATES` has it."""
    try:
        found = re.findall(r"\bJobState=(\w+)", _call("scontrol", "show", "job", "-o", job_id))
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        found = [line.split()[0] for line in _accounted(job_id, "State") if line.strip()]
    states = {_common(name) for name in found}
    return next((name for name in _ORDER if name in states), "unknown")


def comments(job_id: str) -> list[str]:
    """The comments of a job, or of an array's tasks, less what Keel adds to them: whose they are. Nothing for a job that
    Slurm no longer knows; a job without one has the comment ""."""
    try:
        shown = _call("scontrol", "show", "job", "-o", job_id).splitlines()
        found = [re.search(r" Comment=(.*?)\s*(?= \w+=|$)", line) for line in shown if line.strip()]
        said = ["" if match is None else match[1] for match in found]
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        said = list(filter(None, _accounted(job_id, "Comment")))  # which few sites keep
    return [run_of(comment) for comment in said]


def run_of(comment: str) -> str:
    """The URL of the run, of a job's comment."""
    return re.sub(rf"{LOST}\d+$", "", comment)


def cancel(job_id: str) -> None:
    """Ends a job for good: one that runs is told to save first."""
    try:
        rows = _call("squeue", "-h", "-r", "-j", job_id, "-o", "%i %T").splitlines()
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return  # it ended long ago
        raise
    for row in rows:
        name, now = row.split()
        # The batch script forwards it, and cancels its own job when the run has ended.
        options = ("--batch", "--signal=USR2") if now == "RUNNING" else ()
        _call("scancel", *options, name)


def _enough(partition: str, nodes: int, counts: list[int], kind: str) -> None:
    if sum(counts) < nodes:
        raise ValueError(f"nodes={nodes}: partition {partition} has {sum(counts)}{kind}")


def _limit(text: str) -> float | None:
    """Minutes of a partition's limit, as sinfo prints it: `infinite`, `10:00`, `1-00:00:00`."""
    days, _, clock = text.rpartition("-")
    if not re.fullmatch(r"[\d:]+", clock):
        return None
    parts = [0, 0, *map(int, clock.split(":"))][-3:]
    return int(days or 0) * 1440 + parts[0] * 60 + parts[1] + parts[2] / 60


def _gres(text: str, wanted: str) -> int:
    """How many of `wanted` (`gpu` or `gpu:a100`) are in sinfo's list, such as `gpu:a100:8(S:0-1),nic:2`."""
    total = 0
    for item in re.sub(r"\([^)]*\)", "", text).split(","):
        name, _, number = item.rpartition(":")
        if number.isdigit() and (name == wanted or name.startswith(wanted + ":")):
            total += int(number)
    return total


def _common(name: str) -> str:
    return next((common for common, names in _STATES.items() if name in names), "failed")


def _accounted(job_id: str, column: str) -> list[str]:
    """A column of Slurm's data base, for a job that slurmctld has forgotten; nothing where there is none."""
    try:
        return _call("sacct", "-n", "-X", "-P", "-j", job_id, "-o", column).splitlines()
    except SlurmError:
        return []


def _call(program: str, *arguments: str, stdin: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    given = dict(os.environ if environment is None else environment)
    # Settings of the job that this process may itself be part of, or of the user's shell, would change what is asked for.
    clean = {name: value for name, value in given.items() if name == "SLURM_CONF" or not name.startswith(_OPTIONS)}
    try:
        done = subprocess.run(
            [program, *arguments], input=stdin, capture_output=True, text=True, timeout=_TIMEOUT_S, env=clean
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"{program} is not installed here: submit from a machine with Slurm's client commands"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"Slurm does not answer: {program} took over {_TIMEOUT_S} s") from error
    if done.returncode:
        raise SlurmError(_why(program, done.stderr))
    return done.stdout


_OPTIONS = ("SLURM_", "SBATCH_", "SINFO_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SACCT_")


def _why(program: str, said: str) -> str:
    """The cause in one line, of what a Slurm command wrote on standard error."""
    lines = [re.sub(r"^[a-z_]+: (error|fatal): ", "", line).strip() for line in said.splitlines() if line.strip()]
    for line in lines:
        if line.startswith("Munge encode failed"):
            return f"munge does not run here, and Slurm needs it: start munged ({line.removeprefix('Munge encode failed: ')})"
        if "cannot stat file" in line or "Could not establish a configuration source" in line:
            return f"Slurm has no configuration here: set SLURM_CONF, or submit from a login node ({line.partition(', retrying')[0]})"
    if any("Unable to contact slurm controller" in line for line in lines):
        return "Slurm's controller does not answer; is slurmctld running, and is this machine on its network?"
    lines = [line.removeprefix("Batch job submission failed: ") for line in lines]
    if "Invalid job array specification" in lines:
        return "array= is more than Slurm takes (MaxArraySize in its configuration); submit several"
    return f"{program} refused: {lines[0] if lines else 'it said nothing'}"
