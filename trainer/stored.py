"""What a launcher must know of a run whose config lies at its URL.

Read without the config's own classes: these bring torch and Lightning, which the launcher would import for as long as its
worker does, one after the other. The worker checks the whole config.
"""

from dataclasses import dataclass

import yaml

from datamodules.store import NotFound, Store
from trainer.schema import RecoveryConfig, ResourcesConfig


@dataclass(frozen=True)
class Stored:
    """As much of a `RunConfig`."""

    url: str
    resources: ResourcesConfig
    recovery: RecoveryConfig


def read(url: str) -> Stored | None:
    """Of the run at `url`; None where there is none, or its config is not as Keel writes it: `prepare_resume` tells what is
    wrong."""
    try:
        found = yaml.safe_load(Store(url).read("config.yaml"))
        return Stored(found["url"], ResourcesConfig(**found["resources"]), RecoveryConfig(**found["recovery"]))
    except (NotFound, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
