"""Starting and continuing: what must be true of a run's URL before its workers start."""

from datamodules.store import NotFound, Store
from trainer import config as configs
from trainer.checkpoint import committed_steps
from trainer.config import ConfigError
from trainer.records import read_record
from trainer.schema import RunConfig

# What may change between the attempts of one run without changing what it computes (but for reduction order).
RESUMABLE = (
    "resources",
    "log",
    "checkpoint",
    "diagnostics",
    "recovery",
    "strategy",
    "train.max_steps",
    "train.micro_batch",
    "train.compile",
    "train.activation_checkpointing",
    "train.val_every",
    "train.ema_validation",
    "data.url",  # the fingerprint says that they are the same data
    "data.val_samples",
    "data.cache",
    "data.fetch",
    "data.verify",
    "data.cache_bytes",
    "data.read_ahead",
    "data.read_ahead_bytes",
    "data.threads",
)


def prepare_new(config: RunConfig) -> None:
    """Puts the config of a new run at its URL. A run that failed before its first commit there is forgotten.

    Raises:
        ConfigError: the URL already holds a run.
    """
    store = Store(config.url)
    if _stillborn(store):
        store.delete("config.yaml")
    if not store.create("config.yaml", configs.to_yaml(config).encode()):
        raise ConfigError(
            f"a run exists at {config.url}: continue it with `keel resume {config.url}`, or set another url=..."
        )


def _stillborn(store: Store) -> bool:
    """True when what is there ended in an error before anything was saved: a mistake, since mended."""
    if not store.exists("config.yaml") or committed_steps(store.sub("checkpoints")):
        return False
    return store.exists("record.jsonl") and read_record(store)["status"] == "failed"


def prepare_resume(url: str, overrides: list[str]) -> RunConfig:
    """The config of a run to be continued; allowed overrides are stored back for the workers. Raises as `resumed`."""
    config = resumed(url, overrides)
    if overrides:
        store_config(url, config)
    return config


def store_config(url: str, config: RunConfig) -> None:
    """Puts the config of a run that is continued at its URL."""
    Store(configs.absolute_url(url)).write("config.yaml", configs.to_yaml(config).encode())


def resumed(url: str, overrides: list[str]) -> RunConfig:
    """The config of a run to be continued, with `overrides`. Writes nothing.

    Raises:
        ConfigError: no run there, or an override that would change what the run computes.
    """
    store = Store(configs.absolute_url(url))
    try:
        raw = configs.read_yaml(store.join("config.yaml"))
    except (ConfigError, NotFound) as error:
        raise ConfigError(f"no run at {url}: config.yaml is missing there") from error
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == allowed or key.startswith(allowed + ".") for allowed in RESUMABLE):
            raise ConfigError(
                f"{key} cannot change on resume, it would make another run (allowed: {', '.join(RESUMABLE)}); "
                "start a new run with its own url instead"
            )
        section, _, field = key.partition(".")
        if field == "name" and isinstance(raw.get(section), dict):
            raw[section] = {}  # the settings of one variant mean nothing to another
    return configs.load(raw, overrides)
