"""Settings: where they come from, which source wins, and what is said about wrong ones."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.errors import ConfigurationError
from understudy.runtime import settings as module
from understudy.runtime.settings import (
    SETTINGS,
    Defaults,
    Settings,
    default_run_directory,
    memory,
    resolve,
)

DEFAULTS = Defaults(model=Path("/bundled/model"), run_dir=Path("/run/understudy"))


@pytest.fixture(autouse=True)
def system_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for the system's configuration that is this test's own."""
    path = tmp_path / "etc" / "config.toml"
    path.parent.mkdir()
    monkeypatch.setattr(module, "SYSTEM_CONFIG", path)
    return path


def settle(flags: dict[str, str] | None = None, environ: dict[str, str] | None = None) -> Settings:
    return resolve(flags=flags or {}, environ=environ or {}, defaults=DEFAULTS)


def problems(
    flags: dict[str, str] | None = None, environ: dict[str, str] | None = None
) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        settle(flags, environ)
    return caught.value.problems


def test_without_any_source_every_setting_has_its_default() -> None:
    found = settle()
    assert found.values["model"] == DEFAULTS.model
    assert found.values["served_model_name"] == "understudy-demo"
    assert found.values["port"] == 8000
    assert set(found.origins.values()) == {"default"}
    assert set(found.values) == set(found.origins) == set(SETTINGS)


def test_a_flag_beats_the_environment_beats_a_file_beats_the_default(system_config: Path) -> None:
    system_config.write_text("port = 1\nmax-num-seqs = 2\nblock_size = 3\n")
    environ = {"UNDERSTUDY_PORT": "10", "UNDERSTUDY_MAX_NUM_SEQS": "20"}
    found = settle({"port": "100"}, environ)
    names = ("port", "max_num_seqs", "block_size", "host")
    assert [found.values[name] for name in names] == [100, 20, 3, "127.0.0.1"]
    assert [found.origins[name] for name in names] == [
        "flag",
        "UNDERSTUDY_MAX_NUM_SEQS",
        str(system_config),
        "default",
    ]


def test_later_parts_of_the_configuration_beat_earlier_ones(system_config: Path) -> None:
    parts = system_config.parent / "conf.d"
    parts.mkdir()
    system_config.write_text("port = 1")
    (parts / "20-b.toml").write_text("port = 3")
    (parts / "10-a.toml").write_text("port = 2\nhost = '::1'")
    found = settle()
    assert (found.values["port"], found.values["host"]) == (3, "::1")
    assert found.origins["port"].endswith("20-b.toml")


def test_a_chosen_file_takes_the_place_of_the_systems(system_config: Path, tmp_path: Path) -> None:
    system_config.write_text("port = 1")
    chosen = tmp_path / "mine.toml"
    chosen.write_text("host = '0.0.0.0'")
    for flags, environ in (
        ({"config": str(chosen)}, {}),
        ({}, {"UNDERSTUDY_CONFIG": str(chosen)}),
        ({"config": str(chosen)}, {"UNDERSTUDY_CONFIG": "/nowhere"}),
    ):
        found = settle(flags, environ)
        assert (found.values["port"], found.values["host"]) == (8000, "0.0.0.0")


def test_all_problems_of_all_sources_are_told_together(system_config: Path) -> None:
    system_config.write_text("prot = 1\nblock-size = 'x'\nmax-num-seqs = true\n")
    environ = {"UNDERSTUDY_MODLE": "x", "UNDERSTUDY_GPU_MEMORY_UTILIZATION": "nan"}
    found = problems({"port": "65536", "dtype": "bf16"}, environ)
    assert found == (
        f"{system_config}: unknown key 'prot'; did you mean port?",
        "environment: unknown variable UNDERSTUDY_MODLE; did you mean UNDERSTUDY_MODEL?",
        f"{system_config}: block-size: expected a whole number, got 'x'",
        f"{system_config}: max-num-seqs: expected a whole number, got True",
        "UNDERSTUDY_GPU_MEMORY_UTILIZATION: expected a number, got 'nan'",
        "--port: expected 0 to 65535, got 65536",
        "--dtype: expected one of auto, float32, bfloat16, got 'bf16'; did you mean bfloat16?",
    )


def test_a_wrong_value_is_told_even_where_a_better_source_hides_it(system_config: Path) -> None:
    system_config.write_text("port = -1")
    assert problems({"port": "8000"}) == (f"{system_config}: port: expected 0 to 65535, got -1",)


def test_a_chosen_file_that_is_missing_or_no_toml_is_a_problem(tmp_path: Path) -> None:
    assert problems({"config": "/nowhere/x.toml"}) == (
        "/nowhere/x.toml: No such file or directory",
    )
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("port = = 1")
    (problem,) = problems({"config": str(wrong)})
    assert problem.startswith(f"{wrong}: not TOML: Invalid value (at line 1")


def test_a_key_given_in_both_spellings_is_a_problem(system_config: Path) -> None:
    system_config.write_text("block-size = 16\nblock_size = 32\n")
    assert problems() == (f"{system_config}: 'block_size' is given twice",)


def test_what_kubernetes_says_about_a_service_of_our_name_is_no_setting() -> None:
    found = settle(
        environ={
            "UNDERSTUDY_PORT": "tcp://10.0.0.1:8000",
            "UNDERSTUDY_SERVICE_HOST": "10.0.0.1",
            "UNDERSTUDY_SERVICE_PORT": "8000",
            "UNDERSTUDY_SERVICE_PORT_HTTP": "8000",
            "UNDERSTUDY_PORT_8000_TCP": "tcp://10.0.0.1:8000",
            "UNDERSTUDY_PORT_8000_TCP_ADDR": "10.0.0.1",
        }
    )
    assert found.values["port"] == 8000


def test_a_run_directory_too_long_for_a_socket_is_a_problem() -> None:
    fits = "/tmp/" + "x" * (107 - len("/tmp/") - len("/supervisor.sock"))
    assert settle({"run_dir": fits}).values["run_dir"] == Path(fits)
    (problem,) = problems({"run_dir": fits + "x"})
    assert "has 108 bytes; a unix socket's path has at most 107" in problem


def test_the_served_name_is_the_directorys_unless_it_is_given() -> None:
    assert settle({"model": "/models/qwen"}).values["served_model_name"] == "qwen"
    assert settle({"served_model_name": "mine"}).values["served_model_name"] == "mine"


def test_relative_paths_and_the_home_directory_become_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    assert settle({"model": "m"}).values["model"] == tmp_path / "m"
    assert settle({"model": "~/m"}).values["model"] == Path("/home/ada/m")


@pytest.mark.parametrize(
    ("given_size", "size"),
    [(1024, 1024), ("512MiB", 512 << 20), ("2G", 2 * 10**9), ("1.5 KiB", 1536), ("7b", 7)],
)
def test_sizes_are_numbers_of_bytes_with_or_without_a_unit(
    given_size: str | int, size: int
) -> None:
    assert memory(given_size) == size


@pytest.mark.parametrize("wrong", ["", "0", "-1", "x", "1 XB", "inf", "2 MMiB", True, [], 1 << 60])
def test_sizes_that_are_none_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        memory(wrong)


@given(st.sampled_from(sorted(SETTINGS)), st.text() | st.integers() | st.floats() | st.booleans())
def test_no_value_whatever_escapes_its_check(name: str, value: object) -> None:
    with contextlib.suppress(ValueError):
        SETTINGS[name].parse(value)


def test_the_run_directory_follows_the_file_hierarchy_and_xdg() -> None:
    assert default_run_directory({}, uid=0) == Path("/run/understudy")
    runtime = {"XDG_RUNTIME_DIR": "/run/user/7"}
    assert default_run_directory(runtime, uid=7) == Path("/run/user/7/understudy")
    assert default_run_directory({}, uid=7) == Path("/tmp/understudy-7")


def test_no_more_than_ten_settings_are_shown_as_flags() -> None:
    assert sum(setting.group is not None for setting in SETTINGS.values()) <= 10
