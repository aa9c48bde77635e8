"""What a worker is told, as JSON under a key of the store."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.errors import AlreadyExistsError, ConfigError, NotFoundError
from holdfast.storage.protocol import ObjectStore

SETTINGS = "HOLDFAST_BATCH"
"""Environment variable: the key of the settings."""
WORKER = "HOLDFAST_WORKER"
"""Environment variable: which worker of its machine it is, where a machine has several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    queue: str
    queue_name: str
    prefix: str
    function: str
    """`module:callable`: a list of records in, a list of as many results out."""
    setup: str = ""
    """`module:callable`: called once; what it returns is the function's second argument, if the function takes two."""
    batch_time_limit_seconds: float = 600.0
    """Of one call of the function. After it the model's process is killed."""
    visibility_seconds: float = 600.0
    max_deliveries: int = 5
    results_format: str = "jsonl"
    idle_seconds: float = 20.0
    """A worker that gets nothing from the queue for so long ends."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> WorkerSettings:
        """Raises ConfigError."""
        try:
            settings = cls(**content)
        except TypeError as error:
            raise ConfigError(f"the worker's settings are not understood: {error}; write them anew") from error
        for name in ("function", "setup"):
            value = getattr(settings, name)
            module, colon, callable_name = value.partition(":")
            if (value or name == "function") and not (module and colon and callable_name):
                raise ConfigError(f"{name} {value!r}: write module:callable, for example embed:embed")
        for name in ("batch_time_limit_seconds", "visibility_seconds", "idle_seconds"):
            if not getattr(settings, name) > 0:
                raise ConfigError(f"{name} {getattr(settings, name)}: it must be above zero")
        if settings.results_format not in ("jsonl", "parquet"):
            raise ConfigError(f"results_format {settings.results_format!r}: use 'jsonl' or 'parquet'")
        return settings


def settings_key(prefix: str) -> str:
    return f"{prefix}/worker.json"


def write_settings(store: ObjectStore, settings: WorkerSettings) -> str:
    """The key. Raises ConfigError when another job's settings are there: its results would be mixed with this one's."""
    WorkerSettings.from_json(settings.to_json())
    key = settings_key(settings.prefix)
    try:
        store.create(key, json.dumps(settings.to_json(), indent=1).encode())
    except AlreadyExistsError:
        theirs = read_settings(store, key)
        for name in ("function", "setup", "results_format"):
            if getattr(theirs, name) != getattr(settings, name):
                raise ConfigError(
                    f"{store.url}/{settings.prefix} has results of another job: its {name} is {getattr(theirs, name)!r}, "
                    f"this job's {getattr(settings, name)!r}; use another run id or place"
                ) from None
        store.put(key, json.dumps(settings.to_json(), indent=1).encode())
    return key


def read_settings(store: ObjectStore, key: str) -> WorkerSettings:
    """Raises ConfigError."""
    try:
        return WorkerSettings.from_json(json.loads(store.get(key)))
    except NotFoundError:
        raise ConfigError(f"{key} is not in {store.url}: no batch job was written there") from None
    except ValueError as error:
        raise ConfigError(f"{key} in {store.url} is no JSON: {error}") from error
