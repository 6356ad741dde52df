"""The schema of a run and its strict loading: dataclass schema <- YAML <- dotted overrides.

A run config is one dataclass tree. The sections `model`, `task`, `data`, `optim`, `strategy` and `parametrization`
are polymorphic: their key `name` picks a registered variant, whose own dataclass becomes the schema of the section.
Nothing is ever ignored: an unknown key, a wrong type, a missing value or an impossible pair is a `ConfigError`.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, errors

from datamodules import registry as data_registry
from datamodules.store import NotFound, Store
from modules import registry as model_registry
from trainer import optim, parametrization, strategies
from trainer.schema import RunConfig

# What may change between attempts of one run without making it another (but for the order of sums).
_NOT_HASHED = ("name", "url", "resources", "log", "checkpoint", "diagnostics", "strategy")
_NOT_HASHED_OF_TRAIN = ("micro_batch", "val_every", "compile", "activation_checkpointing", "ema_validation")
_NOT_HASHED_OF_RECOVERY = ("parity_every", "init_timeout_seconds", "step_timeout_seconds", "max_restarts")


class ConfigError(ValueError):
    """A config that cannot be run; the message names the key and what to do."""


# Section -> registry look-up: name -> (config dataclass, what it builds). Defaults: the variant used when none is named.
_SECTIONS: dict[str, tuple[Callable[[str], tuple[type, Any]], str | None]] = {
    "model": (lambda name: model_registry.lookup("model", name), None),
    "task": (lambda name: model_registry.lookup("task", name), None),
    "data": (lambda name: data_registry.lookup("data", name), None),
    "optim": (optim.lookup, "adamw"),
    "strategy": (strategies.lookup, "ddp"),
    "parametrization": (parametrization.lookup, "standard"),
}


def load(source: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Loads a run config from a YAML file (local path or any fsspec URL) or a mapping, and applies `a.b=value` overrides.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, missing value or impossible combination.
    """
    raw = read_yaml(source) if isinstance(source, str) else dict(source)
    return _build(merge(raw, overrides))


def read_yaml(source: str) -> dict[str, Any]:
    """The mapping in a YAML file at a path or URL.

    Raises:
        ConfigError: no such file, or not a YAML mapping.
    """
    base, _, name = source.rpartition("/")
    try:
        text = Store(base or ".").read(name).decode()
    except NotFound as error:
        raise ConfigError(f"no config file at {source}") from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} must hold a mapping of sections, not {type(raw).__name__}")
    return raw


def merge(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with dotted overrides applied, still untyped.

    Raises:
        ConfigError: an override that is not of the form `key=value`.
    """
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override '{override}' is not of the form key=value, such as train.max_steps=100")
    try:
        merged = OmegaConf.merge(OmegaConf.create(dict(raw)), OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (errors.OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def structure(schema: type, raw: Mapping[str, Any], path: str = "") -> Any:
    """`raw` checked against the dataclass `schema` and converted to it; `path` prefixes the keys in errors.

    Raises:
        ConfigError: unknown key, wrong type, missing or impossible value.
    """
    node = OmegaConf.structured(schema)
    _refuse_unknown(node, raw, path)
    try:
        merged = OmegaConf.merge(node, OmegaConf.create(dict(raw)))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(
                f"{_join(path, missing[0])} is required: set it in the YAML file or as {_join(path, missing[0])}=..."
            )
        return OmegaConf.to_object(merged)
    except errors.ValidationError as error:
        key = _join(path, str(error.full_key or error.key or ""))
        expected = getattr(error, "ref_type", None) or error.object_type
        raise ConfigError(_type_message(key, error, raw, path, schema, expected)) from error
    except errors.OmegaConfBaseException as error:
        raise ConfigError(f"{path or 'config'}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path + ': ' if path else ''}{error}") from error


def section(name: str, raw: Any) -> Any:
    """One polymorphic section as the dataclass of its variant (with the extra field `name`).

    Raises:
        ConfigError: as `structure`, or an unknown variant.
    """
    look_up, default = _SECTIONS[name]
    if raw is None and default:
        raw = {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{name} is required: a mapping with the key 'name', such as {name}.name=...")
    variant = raw.get("name", default)
    if variant is None:
        raise ConfigError(f"{name}.name is required: it picks the variant")
    try:
        schema, _ = look_up(str(variant))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return structure(_named(schema, str(variant)), {**raw, "name": variant}, name)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as plain containers, in the order of the schema."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def varied(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`config` with values changed by their dotted keys: as strict as `load`, and some hundred times as fast.

    For numbers, words, switches and lists of them that the config has. The variant of a section (its `name`) and mappings
    need `load`. Whether sections fit each other (`trainer.build.check`) is checked once for equal sections.

    Raises:
        ConfigError: unknown key, wrong type, impossible value or combination.
    """
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for key, value in values.items():
        head, _, name = key.partition(".")
        holder = getattr(config, head, None) if name else config
        known = [f.name for f in dataclasses.fields(holder)] if dataclasses.is_dataclass(holder) else []
        if (name or head) not in known or (name == "name" and head in _SECTIONS):
            every = [f"{head}.{k}" for k in known] if known and name else [f.name for f in dataclasses.fields(config)]
            raise ConfigError(_unknown(key, "", every))
        hints = _hints(type(holder))  # type: ignore[arg-type]  # a class is hashable
        target = sections.setdefault(head, {}) if name else top
        target[name or head] = _converted(key, value, hints[name or head])
        if key in ("url", "data.url", "weights.url") and target[name or head]:
            target[name or head] = absolute_url(target[name or head])
    for head, given in sections.items():
        try:
            top[head] = dataclasses.replace(getattr(config, head), **given)
        except ValueError as error:
            raise ConfigError(f"{head}: {error}") from error
    try:
        made = dataclasses.replace(config, **top)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    raw = to_dict(made)
    for key in _UNCHECKED:
        head, _, name = key.partition(".")
        (raw[head] if name else raw).pop(name or head, None)
    _checked(json.dumps(raw, sort_keys=True, default=str), made)
    return made


# What no check of sections against each other looks at: sweeps vary it.
_UNCHECKED = ("name", "url", "seed", "schedule", "log", "optim.lr", "optim.weight_decay", "train.max_steps")
_PLAIN: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
_seen: dict[str, str] = {}  # sections that were checked -> what was wrong with them


def _checked(sections: str, config: RunConfig) -> None:
    from trainer.build import check

    if sections not in _seen:
        try:
            check(config)
            _seen[sections] = ""
        except ConfigError as error:
            _seen[sections] = str(error)
    if _seen[sections]:
        raise ConfigError(_seen[sections])


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _converted(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type of its field."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is list and isinstance(value, list | tuple):
        return [_converted(f"{key}[{i}]", item, typing.get_args(kind)[0]) for i, item in enumerate(value)]
    if kind is float and isinstance(value, str):  # YAML takes 1e-3 for a word
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, _PLAIN.get(kind, ())) or (isinstance(value, bool) and kind is not bool):
        name = getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)
        raise ConfigError(f"{key}={value!r}: expected {name}, got {type(value).__name__}")
    return float(value) if kind is float else value  # type: ignore[arg-type]  # it is a number by now


def config_hash(config: RunConfig, fingerprint: str = "") -> str:
    """First 16 hex digits of the SHA-256 of what decides a run's numbers; the same for all attempts of a run.

    Left out are where it runs and writes, how it is sharded, what is watched, and what the data section's class names in
    `not_hashed` (where the data lie, caches, threads): `fingerprint` says which data they are.
    """
    hashed = {key: value for key, value in to_dict(config).items() if key not in _NOT_HASHED}
    if not config.weights.url:  # random weights, as before there was this section
        del hashed["weights"]
    of_data = getattr(config.data, "not_hashed", ())
    parts = (("train", _NOT_HASHED_OF_TRAIN), ("recovery", _NOT_HASHED_OF_RECOVERY), ("data", of_data))
    for name, unhashed in parts:
        hashed[name] = {key: value for key, value in hashed[name].items() if key not in unhashed}
    return hashlib.sha256(json.dumps([hashed, fingerprint], sort_keys=True).encode()).hexdigest()[:16]


def absolute_url(url: str) -> str:
    """`url` itself when it has a scheme, else the absolute local path (a run is resumed from any folder)."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def _build(raw: dict[str, Any]) -> RunConfig:
    known = {f.name: f for f in dataclasses.fields(RunConfig)}
    for key in raw:
        if key not in known:
            raise ConfigError(_unknown(str(key), "", list(known)))
    values: dict[str, Any] = {}
    plain = []
    for name, f in known.items():
        if name in _SECTIONS:
            values[name] = section(name, raw.get(name))
        elif dataclasses.is_dataclass(f.type):
            given = {} if raw.get(name) is None else raw[name]
            if not isinstance(given, Mapping):
                raise ConfigError(f"{name}={given!r}: expected a section (mapping), got {type(given).__name__}")
            values[name] = structure(f.type, given, name)  # type: ignore[arg-type]
        else:
            default = "???" if f.default is dataclasses.MISSING else f.default
            plain.append((name, f.type, field(default=default)))
    top = structure(dataclasses.make_dataclass("Run", plain), {name: raw[name] for name, *_ in plain if name in raw})
    values |= dataclasses.asdict(top)
    values["url"] = absolute_url(values["url"])
    if "url" in {f.name for f in dataclasses.fields(values["data"])}:
        values["data"].url = absolute_url(values["data"].url)
    if values["weights"].url:
        values["weights"].url = absolute_url(values["weights"].url)
    from trainer.build import check

    try:
        config = RunConfig(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check(config)
    return config


def _named(schema: type, name: str) -> type:
    return dataclasses.make_dataclass(schema.__name__, [("name", str, field(default=name))], bases=(schema,))


def _refuse_unknown(node: DictConfig, raw: Mapping[str, Any], path: str) -> None:
    for key, value in raw.items():
        known = [str(k) for k in node]  # `in` would deny keys whose value is missing
        if key not in known:
            raise ConfigError(_unknown(str(key), path, known))
        child = node._get_node(key)
        if isinstance(child, DictConfig) and OmegaConf.get_type(child) is not dict:
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{_join(path, str(key))}={value!r}: expected a section (mapping), got {type(value).__name__}"
                )
            _refuse_unknown(child, value, _join(path, str(key)))


def _unknown(key: str, path: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f"did you mean '{_join(path, close[0])}'?" if close else f"valid keys: {', '.join(sorted(known))}"
    return f"unknown key '{_join(path, key)}': {hint}"


def _type_message(key: str, error: Exception, raw: Mapping[str, Any], path: str, schema: type, expected: Any) -> str:
    relative = key[len(path) + 1 :] if path else key
    value: Any = raw
    hint: Any = schema
    for part in relative.replace("[", ".").replace("]", "").split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit():
            value = value[int(part)]
        if dataclasses.is_dataclass(hint):
            hint = {f.name: f.type for f in dataclasses.fields(hint)}.get(part, hint)
    name = getattr(hint, "__name__", str(hint)) if not str(hint).startswith("list[") else str(hint)
    return f"{key}={value!r}: expected {name}, got {type(value).__name__}"


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
