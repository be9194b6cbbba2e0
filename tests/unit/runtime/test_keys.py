"""Keys: what the file says, who is let in, and what changes while it is watched."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.control.tenancy import UNLIMITED, TenantPolicy
from understudy.runtime.keys import (
    KEY_PREFIX,
    LOOK_EVERY_S,
    PRESENTED_BYTES_MAX,
    KeyRing,
    KeyTable,
    KeyWatch,
    NewKey,
    TenantRecord,
    make_key,
    read_table,
    write_table,
)


class Time:
    def __init__(self) -> None:
        self.now = 100.0
        self.complaints: list[str] = []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def write(path: Path, *keys: NewKey, **tenants: TenantRecord) -> None:
    write_table(path, KeyTable(tenants=tenants, keys=tuple(key.record for key in keys)))


def watch(path: Path | None, time: Time, api_key: str | None = None) -> KeyWatch:
    return KeyWatch(path, api_key, now=lambda: time.now, complain=time.complaints.append)


def test_a_key_is_long_unlike_any_other_and_not_in_the_file(path: Path) -> None:
    keys = [make_key("acme", created=7) for _ in range(50)]
    assert len({new.key for new in keys}) == len({new.record.id for new in keys}) == 50
    assert all(len(new.key) >= len(KEY_PREFIX) + 43 for new in keys)
    write(path, *keys)
    assert not any(new.key in path.read_text() for new in keys)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_others_could_read_is_their_own_again_when_written(path: Path) -> None:
    write(path)
    path.chmod(0o644)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_only_the_very_key_is_found() -> None:
    keys = [make_key(f"tenant-{number}", created=0) for number in range(5)]
    ring = KeyRing(new.record for new in keys)
    for new in keys:
        presented = new.key.encode()
        for _ in range(2):  # once by comparison, once by the memory of it
            assert ring.find(presented) == new.record
        near = [b"", presented[:-1], presented + b"x", presented.swapcase(), b" " + presented]
        assert [ring.find(one) for one in near] == [None] * len(near)
    assert ring.find(bytes.fromhex(keys[0].record.sha256)) is None
    assert ring.find(keys[0].record.sha256.encode()) is None
    assert ring.find(b"x" * (PRESENTED_BYTES_MAX + 1)) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        '{"version": 2}',
        '{"keys": [{"id": "k", "sha256": "00", "tenant": "a"}]}',
        '{"tenants": {"a": {"weight": 0}}}',
        '{"tenants": {"a": {"wieght": 1}}}',
        '{"tenants": {"a": {"tokens_per_min": 1.5}}}',
        '{"tenants": {"../a": {}}}',
        '{"tenants": {"a\\n": {}}}',
        "[" * 5000,
    ],
)
def test_what_is_no_key_file_is_refused_with_its_path(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match=r"keys\.json: not a key file"):
        read_table(path)


def test_a_file_that_others_may_write_is_refused(path: Path) -> None:
    write(path)
    path.chmod(0o620)
    with pytest.raises(ConfigurationError, match="others may write"):
        read_table(path)


@pytest.mark.parametrize("tenant", ["", "a b", "a/b", "ü", "a" * 65, "-a"])
def test_a_tenant_has_a_name_fit_for_a_log(tenant: str) -> None:
    with pytest.raises(ConfigurationError, match="tenant"):
        make_key(tenant, created=0)


def test_a_change_of_the_file_is_noticed_within_a_second(path: Path) -> None:
    time = Time()
    old, new = make_key("acme", created=0), make_key("acme", created=0)
    write(path, old, acme=TenantRecord(weight=2.0))
    keys = watch(path, time)
    assert keys.asks_for_keys
    assert keys.find(old.key.encode()) == old.record
    write(path, new, acme=TenantRecord(weight=3.0, concurrency=5))
    assert keys.find(old.key.encode()) is not None
    time.now += LOOK_EVERY_S
    assert keys.find(old.key.encode()) is None
    assert keys.find(new.key.encode()) == new.record
    assert keys.policy_of("acme") == TenantPolicy(weight=3.0, concurrency=5)
    assert keys.policy_of("other") is UNLIMITED


def test_a_file_that_breaks_changes_nothing_and_is_complained_of_once(path: Path) -> None:
    time = Time()
    key = make_key("acme", created=0)
    write(path, key)
    keys = watch(path, time)
    path.write_text("{")
    for _ in range(3):
        time.now += LOOK_EVERY_S
        assert keys.find(key.key.encode()) == key.record
    assert len(time.complaints) == 1
    path.unlink()
    time.now += LOOK_EVERY_S
    assert keys.find(key.key.encode()) == key.record
    assert len(time.complaints) == 2
    write(path)
    time.now += LOOK_EVERY_S
    assert keys.find(key.key.encode()) is None


def test_a_file_is_read_at_once_when_told_to(path: Path) -> None:
    time = Time()
    key = make_key("acme", created=0)
    write(path)
    keys = watch(path, time)
    write(path, key)
    keys.reload()
    assert keys.find(key.key.encode()) == key.record


def test_a_key_of_the_settings_stays_beside_those_of_the_file(path: Path) -> None:
    time = Time()
    write(path)
    keys = watch(path, time, api_key="my-own")
    write(path, make_key("acme", created=0))
    time.now += LOOK_EVERY_S
    found = keys.find(b"my-own")
    assert found is not None
    assert found.tenant == "default"
    assert watch(None, time, api_key="x").asks_for_keys
    assert not watch(None, time).asks_for_keys


def test_without_a_file_there_is_nothing_to_start_with(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        watch(path, Time())


def test_a_file_reads_as_it_was_written(path: Path) -> None:
    table: dict[str, Any] = {
        "version": 1,
        "tenants": {"acme": {"weight": 4, "requests_per_s": 20, "tokens_per_min": 600000}},
        "keys": [{"id": "k1", "sha256": "0" * 64, "tenant": "acme", "models": ["demo"]}],
    }
    path.write_text(json.dumps(table))
    path.chmod(0o600)
    read = read_table(path)
    write_table(path, read)
    assert read_table(path) == read
    assert read.tenants["acme"].policy().tokens_per_min == 600000
