"""The frozen configurations, and the flags that give them again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from understudy.runtime.config import (
    EngineConfig,
    GatewayConfig,
    SupervisorConfig,
    arguments_of,
    engine_config,
    environment_of,
    gateway_config,
    launcher_config,
    settings_of,
    supervisor_config,
)
from understudy.runtime.settings import Defaults, Settings, resolve

DEFAULTS = Defaults(model=Path("/bundled/model"), run_dir=Path("/run/understudy"))


def settle(**flags: str) -> Settings:
    return resolve(flags={"config": "/dev/null"} | flags, environ={}, defaults=DEFAULTS)


def flags_in(arguments: list[str]) -> dict[str, str]:
    pairs = (argument.removeprefix("--").split("=", 1) for argument in arguments)
    return {name.replace("-", "_"): value for name, value in pairs}


def test_engines_share_the_cores_unless_threads_are_set() -> None:
    for cores, count, threads in ((8, 2, 4), (2, 2, 1), (2, 3, 1), (5, 2, 2)):
        config = launcher_config(settle(data_parallel_size=str(count)), cores=cores)
        assert [engine.threads for engine in config.engines] == [threads] * count
        assert config.data_parallel_size == count
    config = launcher_config(settle(threads="7", data_parallel_size="2"), cores=2)
    assert [engine.threads for engine in config.engines] == [7, 7]


def test_engines_are_named_by_number() -> None:
    config = launcher_config(settle(data_parallel_size="3"), cores=3)
    assert [engine.name for engine in config.engines] == ["engine-0", "engine-1", "engine-2"]


def test_arguments_give_the_same_configuration_again() -> None:
    settings = settle(
        model="/models/odd name=1",
        kv_cache_memory="1GiB",
        max_model_len="77",
        echo_tokens_per_s="0.1",
        engine="echo",
        port="0",
        shutdown_timeout="7",
        queue_max="5",
        key_file="/keys.json",
    )
    launcher = launcher_config(settings, cores=4)
    for config in (launcher.supervisor, launcher.engines[0], launcher.gateways[0]):
        flags = flags_in(arguments_of(config))
        name = flags.pop("name", "")
        again = resolve(flags=flags, environ={}, defaults=Defaults(Path("/x"), Path("/y")))
        assert config in {
            supervisor_config(again),
            engine_config(again, name=name),
            gateway_config(again, name=name),
        }


def test_a_secret_goes_by_the_environment_and_is_never_shown() -> None:
    config = launcher_config(settle(api_key="sk-secret"), cores=1).gateways[0]
    assert not any("secret" in argument for argument in arguments_of(config))
    assert "secret" not in repr(config)
    environment = environment_of(config)
    assert environment == {"UNDERSTUDY_API_KEY": "sk-secret"}
    flags = flags_in(arguments_of(config))
    name = flags.pop("name")
    again = resolve(flags=flags, environ=environment, defaults=DEFAULTS)
    assert gateway_config(again, name=name) == config


def test_a_configuration_does_not_change_after_start() -> None:
    config = supervisor_config(settle())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.queue_max = 1  # type: ignore[misc]


def test_the_supervisors_socket_lies_in_the_run_directory() -> None:
    config = supervisor_config(settle(run_dir="/tmp/u"))
    assert config.socket == Path("/tmp/u/supervisor.sock")


def test_each_consumer_takes_only_its_own_settings() -> None:
    assert settings_of(SupervisorConfig) == [
        "served_model_name",
        "run_dir",
        "state_dir",
        "journal_sync",
        "key_file",
        "queue_max",
    ]
    assert "port" not in settings_of(EngineConfig)
    assert "block_size" not in settings_of(GatewayConfig)
    assert "shutdown_timeout" in settings_of(GatewayConfig)
