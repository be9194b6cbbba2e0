"""``understudy keys``: whose calls are let in. A running node notices within a second.

Keys are printed once, when they are made; the file has their hashes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.exit_status import ExitStatus
from understudy.runtime.keys import (
    KeyTable,
    TenantRecord,
    make_key,
    read_table,
    write_table,
)
from understudy.tools.configuration import settle

_LIMITS: Final = ("weight", "requests_per_s", "tokens_per_min", "concurrency")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``keys add`` takes beside the name of a tenant."""
    limits = parser.add_argument_group("limits of the tenant; 0: none; not given: as they are")
    limits.add_argument("--weight", type=float, metavar="X", help="share of a busy node (1)")
    limits.add_argument("--requests-per-s", type=float, metavar="X", help="rate of calls")
    limits.add_argument("--tokens-per-min", type=int, metavar="N", help="prompt and output")
    limits.add_argument("--concurrency", type=int, metavar="N", help="requests at a time")
    key = parser.add_argument_group("the key")
    key.add_argument(
        "--priority", type=int, default=0, metavar="N", help="the most urgent it may ask for (0)"
    )
    key.add_argument("--models", default="", metavar="A,B", help="the models it is for (all)")


def add(flags: Mapping[str, str], arguments: argparse.Namespace) -> int:
    """Make a key, print it, and set the limits that were given for its tenant."""
    path = _key_file(flags)
    table = read_table(path) if path.exists() else KeyTable()
    models = tuple(name for name in arguments.models.split(",") if name)
    new = make_key(
        arguments.tenant, created=int(time.time()), priority=arguments.priority, models=models
    )
    tenants = {**table.tenants}
    tenants[arguments.tenant] = _limited(tenants.get(arguments.tenant), arguments)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_table(
        path, msgspec.structs.replace(table, tenants=tenants, keys=(*table.keys, new.record))
    )
    print(new.key)
    print(f"{new.record.id} is in {path}; the key is not shown again", file=sys.stderr)
    return ExitStatus.DONE


def list_all(flags: Mapping[str, str]) -> int:
    """Print a line for each key, with what its tenant is allowed."""
    table = read_table(_key_file(flags))
    if not table.keys:
        print("there are no keys", file=sys.stderr)
        return ExitStatus.DONE
    print(f"{'key':10}  {'made on':10}  {'priority':>8}  {'tenant':16}  limits")
    for key in table.keys:
        made = time.strftime("%Y-%m-%d", time.gmtime(key.created))
        limits = _spelled(table.tenants.get(key.tenant, TenantRecord()))
        if key.models:
            limits += f", models {' '.join(key.models)}"
        print(f"{key.id:10}  {made:10}  {key.priority:>8}  {key.tenant:16}  {limits}")
    return ExitStatus.DONE


def revoke(flags: Mapping[str, str], key_id: str) -> int:
    """Let nobody in with a key any more. What it has begun goes on."""
    path = _key_file(flags)
    table = read_table(path)
    kept = tuple(key for key in table.keys if key.id != key_id)
    if len(kept) == len(table.keys):
        print(f"there is no key {key_id!r} in {path}", file=sys.stderr)
        return ExitStatus.USAGE
    write_table(path, msgspec.structs.replace(table, keys=kept))
    print(f"{key_id} is revoked", file=sys.stderr)
    return ExitStatus.DONE


def _limited(known: TenantRecord | None, arguments: argparse.Namespace) -> TenantRecord:
    """A tenant's limits after the arguments."""
    values: dict[str, Any] = {} if known is None else msgspec.structs.asdict(known)
    for name in _LIMITS:
        given = getattr(arguments, name)
        if given == 0:
            values.pop(name, None)
        elif given is not None:
            values[name] = given
    try:
        return msgspec.convert(values, TenantRecord)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"not a limit: {error}") from error


def _spelled(tenant: TenantRecord) -> str:
    parts = [f"weight {tenant.weight:g}"]
    if tenant.requests_per_s is not None:
        parts.append(f"{tenant.requests_per_s:g} requests/s")
    if tenant.tokens_per_min is not None:
        parts.append(f"{tenant.tokens_per_min} tokens/min")
    if tenant.concurrency is not None:
        parts.append(f"{tenant.concurrency} at a time")
    return ", ".join(parts)


def _key_file(flags: Mapping[str, str]) -> Path:
    path: Path | None = settle(flags, only=("key_file",)).values["key_file"]
    if path is None:
        raise ConfigurationError("there is no key file: give --key-file FILE, or set key-file")
    return path
