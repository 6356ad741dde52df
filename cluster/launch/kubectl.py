"""kubectl, asked and understood."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

_TIMEOUT_S = 60


class KubectlError(OSError):
    """kubectl is not there, the cluster cannot be asked, or it has refused; one line."""


class Missing(KubectlError):
    """The cluster has no such object."""


class Kubectl:
    """kubectl with one context and namespace ("": its current ones)."""

    def __init__(self, context: str, namespace: str) -> None:
        self._options = [f"--context={context}"] * bool(context) + [f"--namespace={namespace}"] * bool(namespace)

    def __call__(self, *arguments: str, stdin: str | None = None) -> str:
        """What kubectl prints.

        Raises:
            KubectlError: it failed; `Missing` when it did not find what was asked for.
        """
        command = ["kubectl", *self._options, "--request-timeout=30s", *arguments]
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except FileNotFoundError as error:
            raise KubectlError(
                "kubectl is not installed here; use a machine that has it, or kubernetes.apply=false, which prints the manifest"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise KubectlError(f"the Kubernetes API does not answer: kubectl took over {_TIMEOUT_S} s") from error
        if done.returncode:
            raise (Missing if "(NotFound)" in done.stderr else KubectlError)(why(done.stderr))
        return done.stdout

    def items(self, resources: str, selector: str) -> list[dict[str, Any]]:
        """The objects that have these labels."""
        found: list[dict[str, Any]] = json.loads(self("get", resources, "-l", selector, "-o", "json"))["items"]
        return found


def why(said: str) -> str:
    """The cause in one line, of what kubectl wrote on standard error."""
    lines = [
        line.strip() for line in said.splitlines() if line.strip() and not line.startswith(("Warning:", "E0", "E1"))
    ]
    text = re.sub(
        r"^(error|Error in configuration|Error from server( \(\w+\))?):\s*",
        "",
        lines[-1] if lines else "it said nothing",
    )
    text = re.sub(r"^error when \w+ \"[^\"]*\": ", "", text)
    if re.search(
        r"[Uu]nable to connect to the server|connection to the server|no configuration has been provided", said
    ):
        return f"the Kubernetes API does not answer ({text.rstrip('?')}); kubernetes.context chooses another cluster"
    if found := re.search(r'no matches for kind "(\w+)" in version "([^"]+)"', said):
        return f"the cluster does not know {found[1]} ({found[2]}): install its operator, or choose another kubernetes.kind"
    if found := re.search(r"the server doesn't have a resource type \"(\w+)\"", said):
        return f"the cluster does not know {found[1]}: install what brings them, or choose another kubernetes.kind"
    if "exceeded quota" in said:
        return f"quota: {text}"
    return f"kubectl refused: {text}"
