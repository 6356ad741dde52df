"""The head of a Ray cluster, asked and understood: Ray Jobs and the State API, over HTTP."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

_TIMEOUT_S = 60
_CONNECT_S = 10
# Ray lets these win over the address that it is given.
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_STATES = {"PENDING": "queued", "RUNNING": "running", "SUCCEEDED": "done", "FAILED": "failed", "STOPPED": "cancelled"}
# Of the states of an array's tasks the first in this order is that of the array.
_ORDER = ("running", "queued", "failed", "cancelled", "done")


class RayError(OSError):
    """Ray cannot be asked, or has refused; one line."""


class Head:
    """The dashboard of a cluster's head at `address`, an URL; "" is that of the environment.

    Each method raises RayError when the head is not there, wants another token, or refuses.
    """

    def __init__(self, address: str = "") -> None:
        self._given = address
        self._client: Any = None

    @property
    def address(self) -> str:
        """The URL, resolved.

        Raises:
            ValueError: neither given nor set.
        """
        found = self._given or next((os.environ[name] for name in _ADDRESSES if "://" in os.environ.get(name, "")), "")
        if not found.startswith(("http://", "https://")):
            raise ValueError(
                f"ray.address={self._given!r}: must be the URL of the head's dashboard, such as http://head:8265; or set "
                "RAY_API_SERVER_ADDRESS to it"
            )
        return found.rstrip("/")

    def check_version(self) -> None:
        """Raises ValueError when the cluster's Ray differs from the one here in more than its last number."""
        there = str(self._ask("/api/version")["ray_version"])
        import ray

        if there.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise ValueError(
                f"the cluster at {self.address} runs Ray {there}, and here is {ray.__version__}: install the same "
                f"(pip install 'ray[default]=={there}')"
            )

    def nodes(self) -> list[tuple[dict[str, float], dict[str, str]]]:
        """(resources, labels) of each node that is alive; `memory` in bytes."""
        rows = self._ask("/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
        return [(row["resources_total"], row["labels"]) for row in rows if row["state"] == "ALIVE"]

    def submit(self, job_id: str, entrypoint: str, env_vars: Mapping[str, str], metadata: Mapping[str, str]) -> None:
        """Queues a job."""
        with _errors(self.address):
            self._connect().submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env={"env_vars": dict(env_vars)},
                metadata=dict(metadata),
            )

    def state(self, job_id: str) -> str:
        """The state of a job, or of an array of them, as `cluster.launch.base.STATES` has it. A job whose driver waits for
        its nodes is queued."""
        states = set()
        for task, status in self._tasks(job_id):
            state = _STATES[status]
            states.add("queued" if state == "running" and not self._placed(task) else state)
        return next((state for state in _ORDER if state in states), "unknown")

    def stop(self, job_id: str) -> None:
        """Sends SIGTERM to the drivers of a job that has not ended."""
        for task, status in self._tasks(job_id):
            if _STATES[status] in ("queued", "running"):
                with _errors(self.address):
                    self._connect().stop_job(task)

    def logs(self, job_id: str) -> Iterator[str]:
        """The lines that the drivers of a job printed so far."""
        for task, _ in self._tasks(job_id):
            with _errors(self.address):
                text = self._connect().get_job_logs(task)
            yield from text.splitlines()

    def _tasks(self, job_id: str) -> list[tuple[str, str]]:
        """(id, status) of the job, or of the tasks of an array in their order; nothing for one that is not known."""
        with _errors(self.address):
            client = self._connect()
            try:
                return [(job_id, str(client.get_job_info(job_id).status.value))]
            except RuntimeError as error:
                if "does not exist" not in str(error):
                    raise
            jobs = {job.submission_id or "": str(job.status.value) for job in client.list_jobs()}
        found = [name for name in jobs if name.startswith(f"{job_id}_") and name[len(job_id) + 1 :].isdigit()]
        return [(name, jobs[name]) for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]

    def _placed(self, task: str) -> bool:
        query = f"filter_keys=name&filter_predicates=%3D&filter_values={quote(task)}&limit=10000"
        rows = self._ask(f"/api/v0/placement_groups?{query}")["data"]["result"]["result"]
        return any(row["state"] in ("CREATED", "RESCHEDULING") for row in rows)

    def _ask(self, path: str) -> Any:
        with _errors(self.address):
            response = self._connect()._do_request("GET", path, timeout=_TIMEOUT_S)
            response.raise_for_status()
            return response.json()

    def _connect(self) -> Any:
        if self._client is None:
            from ray.job_submission import JobSubmissionClient

            url, headers = self.address, _token()
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            # Ray's own attempt has no time-out.
            socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_S).close()
            before = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
            try:
                self._client = JobSubmissionClient(url, headers=headers)
            finally:
                os.environ.update(before)
        return self._client


def _token() -> dict[str, str]:
    """The header that lets one in, where Ray's own settings say that it is needed. Ray would abort for want of a file."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return {}
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        token = os.environ.get("RAY_AUTH_TOKEN") or path.read_text().strip()
    except OSError as error:
        raise RayError(f"RAY_AUTH_MODE=token, but {path} cannot be read: set RAY_AUTH_TOKEN_PATH ({error})") from error
    return {"authorization": f"Bearer {token}"}


@contextlib.contextmanager
def _errors(address: str) -> Iterator[None]:
    """Turns what Ray's client raises into one line."""
    try:
        from ray.exceptions import AuthenticationError
    except ImportError as error:
        raise RayError(f"backend=ray needs Ray here: pip install 'keel[ray]' ({error})") from error
    try:
        yield
    except RayError:
        raise
    except AuthenticationError as error:
        if "no authentication token was found" in str(error):
            raise RayError(
                f"Ray at {address} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
            ) from error
        raise RayError(f"Ray at {address} does not take this token: check RAY_AUTH_TOKEN_PATH") from error
    except OSError as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise RayError(
            f"Ray's dashboard does not answer at {address}: {why}; is the head up, and this its port?"
        ) from error
    except RuntimeError as error:
        raise RayError(f"Ray refused: {' '.join(str(error).split())[:300]}") from error
