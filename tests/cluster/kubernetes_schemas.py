"""A job to render, and the fields of custom resources that Keel uses, written from their public definitions; anything else
is an error.

A Job inside one is checked as `batch/v1`, and a pod's template as `v1`, by `kubernetes-validate` (see `validate`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jsonschema
import kubernetes_validate

from cluster.launch.spec import CodeSpec
from tests.helpers.jobs import FNO

Schema = dict[str, Any]
VERSION = "1.33"


def _object(required: str = "", **properties: Schema) -> Schema:
    """An object with these properties, and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


BASE = dataclasses.replace(
    FNO, env={"NCCL_DEBUG": "WARN", "NOTE": "it's $(HOME)"}, code=CodeSpec(), image="ghcr.io/you/keel:1"
)

STRING: Schema = {"type": "string", "minLength": 1}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
LABEL: Schema = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}
METADATA = _object("name", name=LABEL, namespace=LABEL, labels=STRINGS, annotations=STRINGS)
# Checked on their own, see `validate`.
POD: Schema = {"type": "object", "keel": "pod"}
JOB: Schema = {"type": "object", "keel": "job"}

JOBSET_SPEC = _object(
    "replicatedJobs",
    network=_object(enableDNSHostnames=BOOLEAN, publishNotReadyAddresses=BOOLEAN, subdomain=STRING),
    failurePolicy=_object(maxRestarts=COUNT, restartStrategy=_one_of("Recreate", "BlockingRecreate")),
    ttlSecondsAfterFinished=COUNT,
    replicatedJobs={
        "type": "array",
        "minItems": 1,
        "items": _object(
            "name template",
            name=LABEL,
            replicas=COUNT,
            template=_object("spec", metadata=_object(labels=STRINGS, annotations=STRINGS), spec=JOB),
        ),
    },
)

REPLICAS = _object(
    "template", replicas=POSITIVE, restartPolicy=_one_of("Always", "OnFailure", "Never", "ExitCode"), template=POD
)

RAY_GROUP = {"rayStartParams": STRINGS, "template": POD}

SCHEMAS: dict[tuple[str, str], Schema] = {
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): JOBSET_SPEC,
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): _object(
        "template", mlPolicy=_object(numNodes=POSITIVE), template=_object("spec", spec=JOBSET_SPEC)
    ),
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): _object(
        "runtimeRef",
        runtimeRef=_object(
            "name",
            name=LABEL,
            apiGroup=_one_of("trainer.kubeflow.org"),
            kind=_one_of("TrainingRuntime", "ClusterTrainingRuntime"),
        ),
        trainer=_object(numNodes=POSITIVE),
    ),
    ("kubeflow.org/v1", "PyTorchJob"): _object(
        "pytorchReplicaSpecs",
        runPolicy=_object(
            cleanPodPolicy=_one_of("All", "Running", "None"),
            ttlSecondsAfterFinished=COUNT,
            activeDeadlineSeconds=POSITIVE,
            schedulingPolicy=_object(minAvailable=POSITIVE),
        ),
        pytorchReplicaSpecs=_object("Master", Master=REPLICAS, Worker=REPLICAS),
    ),
    ("ray.io/v1", "RayJob"): _object(
        "entrypoint rayClusterSpec",
        entrypoint=STRING,
        jobId=STRING,
        submissionMode=_one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        backoffLimit=COUNT,
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=_object(
            "headGroupSpec",
            enableInTreeAutoscaling=BOOLEAN,
            headGroupSpec=_object("rayStartParams template", **RAY_GROUP),
            workerGroupSpecs={
                "type": "array",
                "items": _object(
                    "groupName minReplicas maxReplicas rayStartParams template",
                    groupName=LABEL,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    **RAY_GROUP,
                ),
            },
        ),
    ),
}


def validate(document: dict[str, Any]) -> None:
    """Refuses a document with an unknown kind, an unknown or missing field, or a wrong value.

    Raises:
        jsonschema.ValidationError: with the path of what is wrong.
    """
    schema = SCHEMAS.get((document["apiVersion"], document["kind"]))
    if schema is None:
        kubernetes_validate.validate(document, VERSION, strict=True)
        return
    whole = _object("apiVersion kind metadata spec", apiVersion=STRING, kind=STRING, metadata=METADATA, spec=schema)
    jsonschema.Draft202012Validator(whole).validate(document)
    _inner(schema, document["spec"])


def _inner(schema: Schema, value: Any) -> None:
    if schema.get("keel") == "pod":
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": value}
        kubernetes_validate.validate(pod, VERSION, strict=True)
    elif schema.get("keel") == "job":
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": value}
        kubernetes_validate.validate(job, VERSION, strict=True)
    elif isinstance(value, dict):
        for name, inner in value.items():
            _inner(schema.get("properties", {}).get(name, {}), inner)
    elif isinstance(value, list):
        for inner in value:
            _inner(schema["items"], inner)
