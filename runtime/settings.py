"""Every setting that an operator can give, where it may come from, and what it must look like.

Knows no consumer: ``understudy.runtime.config`` makes the frozen configurations from the values
found here. A setting has one name everywhere::

    --max-model-len 4096                    a flag
    UNDERSTUDY_MAX_MODEL_LEN=4096           an environment variable
    max-model-len = 4096                    TOML; max_model_len is the same key

The first of these that names it wins, then its default. Whatever is wrong in any of them is
reported together, so that an operator mends a configuration once.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.parsers.names import REASONING_PARSERS, TOOL_PARSERS
from understudy.runtime.speculative_config import parse_speculative_config

ENVIRONMENT_PREFIX: Final = "UNDERSTUDY_"
SYSTEM_CONFIG: Final = Path("/etc/understudy/config.toml")
BUNDLED_NAME: Final = "understudy-demo"
SUPERVISOR_SOCKET: Final = "supervisor.sock"
SOCKET_PATH_BYTES_MAX: Final = 107
"""``sun_path`` of a unix socket holds 108 bytes, of which one ends the string (unix(7))."""

Parse = Callable[[Any], Any]
"""Gives a setting's value from a flag's text or a TOML value, or raises ``ValueError``."""

_BYTES: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_SERVICE_LINK: Final = re.compile(r"UNDERSTUDY_(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP)\w*)")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. ``group`` is its heading in ``understudy start --help``.

    A setting without a group is meant for TOML and the environment: its flag works and is not
    shown, because a command that shows more than a dozen flags shows none.
    """

    name: str
    parse: Parse
    default: Any
    help: str
    metavar: str
    group: str | None = None

    @property
    def flag(self) -> str:
        """The setting's flag on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The setting's environment variable."""
        return ENVIRONMENT_PREFIX + self.name.upper()


class Defaults(NamedTuple):
    """Defaults that depend on the machine and on what is installed."""

    model: Path
    """The bundled model's directory."""
    run_dir: Path


class Settings(NamedTuple):
    """A value for every setting, and where each came from."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]


class Source(NamedTuple):
    """What one source gives: values by setting name, unchecked."""

    origin: str
    """``flag``, ``environment``, or a file's path."""
    given: Mapping[str, Any]

    def place(self, name: str) -> str:
        """Where in this source the setting stands, for a message about it."""
        match self.origin:
            case "flag":
                return SETTINGS[name].flag
            case "environment":
                return SETTINGS[name].variable
            case file:
                return f"{file}: {name.replace('_', '-')}"


def text(value: Any) -> str:
    """A line of text without control characters."""
    if not (isinstance(value, str) and value and value.isprintable()):
        raise ValueError(f"expected printable text, got {value!r}")
    return value


def path(value: Any) -> Path:
    """An absolute path; ``~`` is the home directory."""
    try:
        return Path(text(value)).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def run_directory(value: Any) -> Path:
    """An absolute path short enough for the sockets in it."""
    directory = path(value)
    length = len(os.fsencode(directory / SUPERVISOR_SOCKET))
    if length > SOCKET_PATH_BYTES_MAX:
        raise ValueError(
            f"{directory}/{SUPERVISOR_SOCKET} has {length} bytes; a unix socket's path has at most"
            f" {SOCKET_PATH_BYTES_MAX}: choose a shorter directory"
        )
    return directory


def integer(minimum: int, maximum: int) -> Parse:
    """A whole number within limits."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d{1,18}", str(value).strip()):
            raise ValueError(f"expected a whole number, got {value!r}")
        if not minimum <= int(value) <= maximum:
            raise ValueError(f"expected {minimum} to {maximum}, got {value}")
        return int(value)

    return parse


def number(minimum: float, maximum: float) -> Parse:
    """A finite number within limits."""

    def parse(value: Any) -> float:
        try:
            result = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected a number, got {value!r}") from error
        if isinstance(value, bool) or not math.isfinite(result):
            raise ValueError(f"expected a number, got {value!r}")
        if not minimum <= result <= maximum:
            raise ValueError(f"expected {minimum:g} to {maximum:g}, got {result:g}")
        return result

    return parse


def memory(value: Any) -> int:
    """A size in bytes: a whole number, or text such as ``512MiB``, ``2G`` or ``1.5 GB``."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        found = _BYTES.fullmatch(str(value).strip())
        if found is None:
            raise ValueError(f"expected a size such as 512MiB or 2GB, got {value!r}")
        power = " kmgt".index(found[2].lower() or " ")
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if not 1 <= size < 1 << 50:
        raise ValueError(f"expected 1 byte to 1 PiB, got {size} bytes")
    return size


def choice(*choices: str) -> Parse:
    """One word of a few."""

    def parse(value: Any) -> str:
        if value not in choices:
            near = did_you_mean(str(value), choices)
            raise ValueError(f"expected one of {', '.join(choices)}, got {value!r}{near}")
        return str(value)

    return parse


def switch(value: Any) -> bool:
    """``true`` or ``false``."""
    word = str(value).lower()
    if word not in {"true", "false"}:
        raise ValueError(f"expected true or false, got {value!r}")
    return word == "true"


def speculation(value: Any) -> str:
    """JSON, as ``parse_speculative_config`` reads it."""
    text = value if isinstance(value, str) else json.dumps(value)
    parse_speculative_config(text)
    return text


_MODEL: Final = "model"
_CLUSTER: Final = "cluster"
_MEMORY: Final = "batch and memory"

_ALL: Final = (
    Setting("model", path, None, "directory of the model; default: the bundled one", "DIR", _MODEL),
    Setting("served_model_name", text, None, "its name at the API", "NAME", _MODEL),
    Setting("max_model_len", integer(1, 1 << 24), None, "longest prompt and answer", "N", _MODEL),
    Setting(
        "engine",
        choice("model", "echo"),
        "model",
        "model, or echo: no model at all",
        "KIND",
        _CLUSTER,
    ),
    Setting("data_parallel_size", integer(1, 64), 1, "number of engines", "N", _CLUSTER),
    Setting("host", text, "127.0.0.1", "address to listen on", "H", _CLUSTER),
    Setting("port", integer(0, 65535), 8000, "port to listen on; 0: a free one", "P", _CLUSTER),
    Setting("run_dir", run_directory, None, "directory of sockets and locks", "DIR", _CLUSTER),
    Setting("max_num_seqs", integer(1, 4096), 64, "sequences in one step", "N", _MEMORY),
    Setting("kv_cache_memory", memory, None, "KV cache of each engine, as 2GiB", "SIZE", _MEMORY),
    Setting("tool_call_parser", choice(*TOOL_PARSERS), None, "how the model calls tools", "FORMAT"),
    Setting("reasoning_parser", choice(*REASONING_PARSERS), None, "how the model thinks", "FORMAT"),
    Setting("api_server_count", integer(1, 64), 1, "gateways that accept on the port", "N"),
    Setting("max_num_batched_tokens", integer(1, 1 << 20), 2048, "tokens in one step", "N"),
    Setting("block_size", integer(1, 1024), 16, "tokens in one KV block", "N"),
    Setting("enable_prefix_caching", switch, True, "share computed prefixes; true or false", "B"),
    Setting(
        "speculative_config",
        speculation,
        None,
        'as {"method": "ngram"}, or with "model": a draft model',
        "JSON",
    ),
    Setting("dtype", choice("auto", "float32", "bfloat16"), "auto", "format of weights", "TYPE"),
    Setting(
        "quantization",
        choice("none", "int8", "int4", "fp8"),
        "none",
        "what weights become at load: int8 is W8A8, int4 is weight-only, fp8 for GPUs",
        "KIND",
    ),
    Setting(
        "kv_cache_dtype",
        choice("auto", "int8", "fp8"),
        "auto",
        "format of keys and values; auto: as the model computes",
        "TYPE",
    ),
    Setting(
        "numerics",
        choice("exact", "fast"),
        "exact",
        "exact: a text does not depend on what else is in the batch",
        "CLASS",
    ),
    Setting("device", choice("auto", "cpu", "cuda"), "auto", "device of the engines", "KIND"),
    Setting(
        "gpu_memory_utilization", number(0.01, 1.0), 0.9, "share of a GPU that an engine uses", "X"
    ),
    Setting("threads", integer(1, 1024), None, "threads of an engine; default: its share", "N"),
    Setting("echo_tokens_per_s", number(0, 1e9), 0.0, "rate of an echo's stream; 0: no limit", "X"),
    Setting("state_dir", path, None, "directory of the journal (default: state in run-dir)", "DIR"),
    Setting(
        "journal_sync",
        choice("process", "group", "strict"),
        "process",
        "when the journal is brought onto the disk",
        "WHEN",
    ),
    Setting("api_key", text, None, "a key that every call needs; better in a key file", "KEY"),
    Setting("key_file", path, None, "file of keys and tenants, for understudy keys", "FILE"),
    Setting("tls_certificate", path, None, "certificate chain; with tls-key: HTTPS", "FILE"),
    Setting("tls_key", path, None, "private key of the certificate", "FILE"),
    Setting("connections_per_address", integer(1, 1 << 20), 8192, "connections of one client", "N"),
    Setting("queue_max", integer(1, 1 << 20), 1024, "requests that may wait", "N"),
    Setting("start_timeout", number(1, 86400), 600.0, "seconds to become ready", "S"),
    Setting("shutdown_timeout", number(0, 86400), 30.0, "seconds for streams at the end", "S"),
)

SECRETS: Final = frozenset({"api_key"})
"""Settings that are shown to nobody, and handed to child processes by the environment."""

SETTINGS: Final[Mapping[str, Setting]] = {setting.name: setting for setting in _ALL}


def default_run_directory(environ: Mapping[str, str], *, uid: int) -> Path:
    """Where sockets and lock lie if nothing else is said (FHS 3.0 and the XDG base directories)."""
    if uid == 0:
        return Path("/run/understudy")
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "understudy"
    return Path("/tmp") / f"understudy-{uid}"  # noqa: S108 - checked for owner and mode at start


def resolve(
    *,
    flags: Mapping[str, str],
    environ: Mapping[str, str],
    defaults: Defaults,
    only: Collection[str] | None = None,
) -> Settings:
    """Find a value for every setting.

    Args:
        flags: texts of the flags that were given, by setting name; also ``config``.
        environ: the process's environment.
        defaults: defaults that depend on the machine.
        only: the settings that matter; what is wrong elsewhere is then no problem, so that a
            mistake in a file does not hide how a running cluster is.

    Raises:
        ConfigurationError: with every problem of every source.
    """
    strays: list[str] = []
    sources = [
        *_read_files(flags.get("config") or environ.get("UNDERSTUDY_CONFIG"), strays),
        _read_environment(environ, strays),
        Source("flag", {name: value for name, value in flags.items() if name != "config"}),
    ]
    problems = strays if only is None else []
    values: dict[str, Any] = {name: setting.default for name, setting in SETTINGS.items()}
    values |= defaults._asdict()
    origins = dict.fromkeys(values, "default")
    for source in sources:
        for name, value in source.given.items():
            if only is not None and name not in only:
                continue
            try:
                values[name] = SETTINGS[name].parse(value)
            except ValueError as error:
                problems.append(f"{source.place(name)}: {error}")
            origins[name] = source.place(name) if source.origin == "environment" else source.origin
    if values["served_model_name"] is None:
        is_bundled = values["model"] == defaults.model
        values["served_model_name"] = BUNDLED_NAME if is_bundled else values["model"].name
    if problems:
        raise ConfigurationError(*problems)
    return Settings(values, origins)


def _read_files(chosen: str | None, problems: list[str]) -> list[Source]:
    """The tables of the configuration files, weakest first."""
    if chosen is not None:
        files: Sequence[Path] = [Path(chosen).expanduser()]
    else:
        parts = sorted(SYSTEM_CONFIG.parent.joinpath("conf.d").glob("*.toml"))
        files = [file for file in (SYSTEM_CONFIG, *parts) if file.exists()]
    sources: list[Source] = []
    if not files:
        return sources
    # Imported when there is something to read: it would double the time of this module's import.
    import tomllib

    for file in files:
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            problems.append(f"{file}: {error.strerror}")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            problems.append(f"{file}: not TOML: {error}")
        else:
            sources.append(Source(str(file), _known(table, str(file), problems)))
    return sources


def _known(table: Mapping[str, Any], file: str, problems: list[str]) -> Mapping[str, Any]:
    """The settings in a table, by name; whatever is none becomes a problem."""
    known: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in SETTINGS:
            near = did_you_mean(key, (other.replace("_", "-") for other in SETTINGS))
            problems.append(f"{file}: unknown key {key!r}{near}")
        elif name in known:
            problems.append(f"{file}: {key!r} is given twice")
        else:
            known[name] = value
    return known


def _read_environment(environ: Mapping[str, str], problems: list[str]) -> Source:
    """The settings in the environment, by name.

    Kubernetes puts ``UNDERSTUDY_PORT=tcp://10.0.0.1:8000`` and its like into every pod beside a
    service called understudy. Nobody meant those as settings: they are passed over.
    """
    variables = {setting.variable: name for name, setting in SETTINGS.items()}
    known: dict[str, str] = {}
    for variable, value in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == "UNDERSTUDY_CONFIG":
            continue
        if _SERVICE_LINK.fullmatch(variable) or value.startswith(("tcp://", "udp://")):
            continue
        if variable in variables:
            known[variables[variable]] = value
        else:
            near = did_you_mean(variable, variables)
            problems.append(f"environment: unknown variable {variable}{near}")
    return Source("environment", known)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of an error message: the known word that looks most like the unknown one, if any."""
    import difflib

    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]}?" if near else ""
