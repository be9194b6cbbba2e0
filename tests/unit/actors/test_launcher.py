"""The topology of a node, which is data."""

from __future__ import annotations

import sys
from pathlib import Path

from understudy.actors.launcher import topology
from understudy.runtime.config import LauncherConfig, launcher_config
from understudy.runtime.kit.process import ProcessSpec, RestartPolicy
from understudy.runtime.settings import Defaults, resolve

DEFAULTS = Defaults(model=Path("/bundled/model"), run_dir=Path("/run/understudy"))


def config(**flags: str) -> LauncherConfig:
    settings = resolve(flags={"config": "/dev/null"} | flags, environ={}, defaults=DEFAULTS)
    return launcher_config(settings, cores=8)


def specs_of(config: LauncherConfig) -> list[ProcessSpec]:
    return topology(config, listen_fd=9)


def test_a_node_is_a_supervisor_its_engines_and_a_gateway() -> None:
    specs = specs_of(config(data_parallel_size="3"))
    assert [spec.name for spec in specs] == [
        "supervisor",
        "engine-0",
        "engine-1",
        "engine-2",
        "gateway-0",
    ]
    assert {spec.restart for spec in specs} == {RestartPolicy()}


def test_gateways_accept_on_one_socket() -> None:
    gateways = specs_of(config(api_server_count="2"))[2:]
    assert [spec.name for spec in gateways] == ["gateway-0", "gateway-1"]
    assert [spec.descriptors for spec in gateways] == [(9,), (9,)]


def test_each_process_says_in_its_command_line_what_it_is() -> None:
    for spec in specs_of(config()):
        role = spec.name.partition("-")[0]
        assert spec.argv[:5] == (sys.executable, "-P", "-m", "understudy.tools.cli", role)
        assert "--run-dir=/run/understudy" in spec.argv
        assert "--config=/dev/null" in spec.argv


def test_engines_share_the_cores_also_for_libraries_that_start_threads() -> None:
    engines = [spec for spec in specs_of(config(data_parallel_size="4")) if "engine" in spec.argv]
    assert [spec.environment for spec in engines] == [{"OMP_NUM_THREADS": "2"}] * 4
    assert all("--threads=2" in spec.argv for spec in engines)


def test_only_the_gateway_is_told_where_to_listen() -> None:
    *others, gateway = specs_of(config(host="::1", port="77"))
    assert {"--host=::1", "--port=77"} <= set(gateway.argv)
    assert not any(word.startswith("--port") for spec in others for word in spec.argv)
    assert "--listen-fd=9" in gateway.argv
    assert gateway.descriptors == (9,)
    assert not any(spec.descriptors for spec in others)
