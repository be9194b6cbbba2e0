"""The key file: which keys open the door, whose they are, and what their tenants are allowed.

    {"version": 1,
     "tenants": {"acme": {"weight": 4, "requests_per_s": 20, "tokens_per_min": 600000}},
     "keys": [{"id": "k3f29c1", "sha256": "…", "tenant": "acme", "created": 1767225600}]}

No key is in it, only hashes. A key has 256 random bits, so that its plain SHA-256 tells nobody
what it is; salts and slow hashes are for passwords, which people choose.

The file is read again when its time, size or inode changes, looked at once a second at most: no
process has to be told, and none is started anew. A file that has become unreadable changes
nothing, and is complained of once.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from collections.abc import Callable, Iterable
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.control.tenancy import UNLIMITED, TenantPolicy

KEY_PREFIX: Final = "sk-understudy-"
KEY_BYTES: Final = 32
PRESENTED_BYTES_MAX: Final = 512
LOOK_EVERY_S: Final = 1.0
KEYS_MAX: Final = 100_000
DEFAULT_TENANT: Final = "default"
"""Whose the key is that was given as a setting."""

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}\Z")]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]


class TenantRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file says of a tenant."""

    weight: Annotated[float, msgspec.Meta(ge=1e-3, le=1e6)] = 1.0
    requests_per_s: Positive | None = None
    tokens_per_min: Count | None = None
    concurrency: Count | None = None

    def policy(self) -> TenantPolicy:
        """The same, for who decides."""
        return TenantPolicy(
            weight=self.weight,
            requests_per_s=self.requests_per_s,
            tokens_per_min=self.tokens_per_min,
            concurrency=self.concurrency,
        )


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file says of a key."""

    id: Name
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    tenant: Name
    created: int = 0
    """Seconds since 1970."""
    priority: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)] = 0
    """The most urgent, so the lowest, that calls with this key may ask for."""
    models: tuple[str, ...] = ()
    """The models that it is for; none: all."""


class KeyTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key file."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    tenants: dict[Name, TenantRecord] = msgspec.field(default_factory=dict)
    keys: tuple[KeyRecord, ...] = ()


class NewKey(NamedTuple):
    """A key that was just made. It is shown once: the file has its hash only."""

    key: str
    record: KeyRecord


def make_key(
    tenant: str, *, created: int, priority: int = 0, models: tuple[str, ...] = ()
) -> NewKey:
    """Draw a key for a tenant.

    Raises:
        ConfigurationError: the tenant's name is none, or the priority is out of range.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    fields = {
        "id": f"k{secrets.token_hex(4)}",
        "sha256": sha256(key.encode()).hexdigest(),
        "tenant": tenant,
        "created": created,
        "priority": priority,
        "models": models,
    }
    try:
        return NewKey(key, msgspec.convert(fields, KeyRecord))
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"not a key: {error}") from error


def key_of_setting(key: str) -> KeyRecord:
    """The record of a key that was given as a setting."""
    return KeyRecord(id="setting", sha256=sha256(key.encode()).hexdigest(), tenant=DEFAULT_TENANT)


def read_table(path: Path) -> KeyTable:
    """Read a key file.

    Raises:
        ConfigurationError: there is none, it is no key file, or others may change it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read()
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(f"{path}: others may write it: chmod 600")
    try:
        table = msgspec.json.decode(raw, type=KeyTable)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not a key file: {error}") from error
    if len(table.keys) > KEYS_MAX:
        raise ConfigurationError(f"{path}: more than {KEYS_MAX} keys")
    return table


def write_table(path: Path, table: KeyTable) -> None:
    """Replace a key file in one step; only its owner may read it.

    Raises:
        ConfigurationError: it cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(msgspec.json.format(msgspec.json.encode(table), indent=2) + b"\n")
            file.flush()
            os.fsync(descriptor)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise ConfigurationError(f"{path}: {error.strerror}") from error


class KeyRing:
    """The keys that are known at the moment."""

    def __init__(self, keys: Iterable[KeyRecord]) -> None:
        self._keys = [(bytes.fromhex(key.sha256), key) for key in keys]
        self._secret = secrets.token_bytes(32)
        self._accepted: dict[bytes, KeyRecord] = {}

    def find(self, presented: bytes) -> KeyRecord | None:
        """The key that was presented, if it is known.

        What is presented is compared, by its hash and in constant time, with every key, so that
        the time tells neither how near a guess was nor which key it is. A key that was accepted
        is found directly the next time, under a hash with a secret of this process: that takes
        less time, and says no more than the answer to the call.
        """
        if not 0 < len(presented) <= PRESENTED_BYTES_MAX:
            return None
        mark = blake2b(presented, key=self._secret, digest_size=16).digest()
        accepted = self._accepted.get(mark)
        if accepted is not None:
            return accepted
        digest = sha256(presented).digest()
        found = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        if found is not None:
            self._accepted[mark] = found
        return found


class _Stamp(NamedTuple):
    """What changes when a file does."""

    modified_ns: int
    num_bytes: int
    inode: int


class KeyWatch:
    """The key file as it is at the moment, and a key that was given as a setting.

    Args:
        path: The file; ``None``: there is none.
        api_key: A key beside those of the file.
        now: Gives the time in seconds, of any clock that does not go back.
        complain: Told once why a file cannot be read that could be read before.

    Raises:
        ConfigurationError: the file cannot be read.
    """

    def __init__(
        self,
        path: Path | None,
        api_key: str | None,
        *,
        now: Callable[[], float],
        complain: Callable[[str], None],
    ) -> None:
        self._path = path
        self._extra = () if api_key is None else (key_of_setting(api_key),)
        self._now = now
        self._complain = complain
        self._stamp: _Stamp | None = None
        self._policies: dict[str, TenantPolicy] = {}
        self._ring = KeyRing(self._extra)
        self._looked_at = now()
        if path is not None:
            self._stamp = _stamp(path)
            self._take(read_table(path))

    @property
    def asks_for_keys(self) -> bool:
        """Whether a call needs a key at all."""
        return self._path is not None or bool(self._extra)

    def find(self, presented: bytes) -> KeyRecord | None:
        """The key that was presented, if it is known now."""
        self._look()
        return self._ring.find(presented)

    def policy_of(self, tenant: str) -> TenantPolicy:
        """What a tenant is allowed now."""
        self._look()
        return self._policies.get(tenant, UNLIMITED)

    def reload(self) -> None:
        """Read the file, changed or not."""
        if self._path is None:
            return
        self._stamp = _stamp(self._path)
        try:
            self._take(read_table(self._path))
        except ConfigurationError as error:
            self._complain(f"the keys stay as they are: {error}")

    def _look(self) -> None:
        now = self._now()
        if self._path is None or now < self._looked_at + LOOK_EVERY_S:
            return
        self._looked_at = now
        if _stamp(self._path) != self._stamp:
            self.reload()

    def _take(self, table: KeyTable) -> None:
        self._ring = KeyRing((*table.keys, *self._extra))
        self._policies = {name: record.policy() for name, record in table.tenants.items()}


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _Stamp(found.st_mtime_ns, found.st_size, found.st_ino)
