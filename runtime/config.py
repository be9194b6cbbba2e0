"""What each process must know to start: one frozen dataclass for each consumer.

Values come from ``understudy.runtime.settings``, checked; nothing here changes after start. A
configuration can be turned into the flags that give it again, which is how the launcher hands
each child its own: a child reads no file, so that an edit of a file never reaches half a cluster.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from understudy.runtime.settings import SECRETS, SETTINGS, SUPERVISOR_SOCKET, Settings

T = TypeVar("T")

NO_FILE: Final = "/dev/null"
"""As ``--config``: read no configuration file."""

_SECONDS: Final = frozenset({"start_timeout", "shutdown_timeout"})
"""Settings whose flag keeps the name that users know, while the field is named for its unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig:
    """What a supervisor must know. It answers on a socket in ``run_dir``."""

    run_dir: Path
    served_model_name: str
    queue_max: int
    """Requests that may wait for an engine; beyond them the supervisor refuses."""
    state_dir: Path | None
    """Where the journal lies; ``None``: in ``run_dir``."""
    journal_sync: Literal["process", "group", "strict"]
    """What a crash of the machine, not of a process, may cost: see ``runtime.storage.journal``."""
    key_file: Path | None
    """What tenants are allowed; ``None``: there are none."""

    @property
    def journal_dir(self) -> Path:
        """The directory of the journal."""
        return (self.state_dir or self.run_dir / "state") / "journal"

    @property
    def quarantine_dir(self) -> Path:
        """The directory of what quarantined requests asked."""
        return (self.state_dir or self.run_dir / "state") / "quarantine"

    @property
    def socket(self) -> Path:
        """The socket that every other actor connects to."""
        return self.run_dir / SUPERVISOR_SOCKET


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine must know. With ``engine`` "echo" it runs no model and needs no torch."""

    name: str
    run_dir: Path
    engine: Literal["model", "echo"]
    model: Path
    served_model_name: str
    dtype: Literal["auto", "float32", "bfloat16"]
    numerics: Literal["exact", "fast"]
    quantization: Literal["none", "int8", "int4", "fp8"]
    kv_cache_dtype: Literal["auto", "int8", "fp8"]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None
    """The longest prompt and answer together; ``None``: as long as the model can."""
    block_size: int
    enable_prefix_caching: bool
    speculative_config: str | None
    """JSON; ``None``: no speculation."""
    kv_cache_memory: int | None
    """Bytes; ``None``: chosen from what the device has."""
    data_parallel_size: int
    """Engines that share this machine's memory."""
    gpu_memory_utilization: float
    threads: int | None
    """``None``: all cores."""
    device: Literal["auto", "cpu", "cuda"]
    echo_tokens_per_s: float
    """The rate of one stream of the echo engine; 0 means as fast as it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What a gateway must know. ``port`` 0 is any free one."""

    name: str
    run_dir: Path
    host: str
    port: int
    model: Path
    """Where the tokenizer and the chat template are."""
    served_model_name: str
    max_model_len: int | None
    shutdown_timeout_s: float
    """How long open streams may go on when the gateway is told to stop."""
    key_file: Path | None
    """Whose keys are let in; ``None``: there is no such file."""
    api_key: str | None = dataclasses.field(repr=False)
    """A further key. With neither, calls need no key."""
    tls_certificate: Path | None
    tls_key: Path | None
    """With a certificate and its key it is HTTPS that is served."""
    connections_per_address: int
    tool_call_parser: str | None = None
    """The format in which the model calls tools; ``None``: it cannot be given any."""
    reasoning_parser: str | None = None
    """The format in which the model thinks; ``None``: thoughts are not told from the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherConfig:
    """All that ``understudy start`` takes: one configuration for each process to be started."""

    run_dir: Path
    supervisor: SupervisorConfig
    engines: tuple[EngineConfig, ...]
    gateways: tuple[GatewayConfig, ...]
    start_timeout_s: float
    shutdown_timeout_s: float

    @property
    def data_parallel_size(self) -> int:
        """The number of engine processes."""
        return len(self.engines)

    @property
    def api_server_count(self) -> int:
        """The number of gateway processes. They accept on one socket."""
        return len(self.gateways)


def supervisor_config(settings: Settings) -> SupervisorConfig:
    """The configuration of a supervisor."""
    return _build(SupervisorConfig, settings)


def engine_config(settings: Settings, *, name: str) -> EngineConfig:
    """The configuration of the engine of this name."""
    return _build(EngineConfig, settings, name=name)


def gateway_config(settings: Settings, *, name: str) -> GatewayConfig:
    """The configuration of the gateway of this name."""
    return _build(GatewayConfig, settings, name=name)


def launcher_config(settings: Settings, *, cores: int) -> LauncherConfig:
    """The configuration of a whole node.

    Engines that each used every core would wait for one another at every matrix product, so
    unless ``threads`` is set they share ``cores`` evenly.
    """
    count = settings.values["data_parallel_size"]
    threads = settings.values["threads"] or max(1, cores // count)
    engines = (engine_config(settings, name=f"engine-{index}") for index in range(count))
    return _build(
        LauncherConfig,
        settings,
        supervisor=supervisor_config(settings),
        engines=tuple(dataclasses.replace(engine, threads=threads) for engine in engines),
        gateways=tuple(
            gateway_config(settings, name=f"gateway-{index}")
            for index in range(settings.values["api_server_count"])
        ),
    )


def arguments_of(config: SupervisorConfig | EngineConfig | GatewayConfig) -> list[str]:
    """The flags that give this configuration again, whatever files and environment say.

    All but the secrets: everybody may read a command line. See ``environment_of``.
    """
    arguments = [f"--config={NO_FILE}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None and field.name not in SECRETS:
            name = _setting_name(field.name)
            arguments.append(f"--{name.replace('_', '-')}={value}")
    return arguments


def environment_of(config: SupervisorConfig | EngineConfig | GatewayConfig) -> dict[str, str]:
    """The variables that give the secrets of this configuration again."""
    names = [field.name for field in dataclasses.fields(config) if field.name in SECRETS]
    given = {SETTINGS[name].variable: getattr(config, name) for name in names}
    return {variable: value for variable, value in given.items() if value is not None}


def settings_of(kind: type) -> list[str]:
    """The settings that a configuration of this class is made from, in the order of the table."""
    names = {_setting_name(field.name) for field in dataclasses.fields(kind)}
    return [name for name in SETTINGS if name in names]


def _build(kind: type[T], settings: Settings, **given: Any) -> T:
    """Make a configuration from the settings that have its fields' names."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = {name: settings.values[_setting_name(name)] for name in names if name not in given}
    return kind(**values, **given)


def _setting_name(field_name: str) -> str:
    bare = field_name.removesuffix("_s")
    return bare if bare in _SECONDS else field_name
