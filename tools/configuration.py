"""Finding the configuration of this machine, and ``understudy config``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.settings import (
    SECRETS,
    SETTINGS,
    Defaults,
    Settings,
    default_run_directory,
    resolve,
)
from understudy.tools.demo.paths import demo_model_directory


def settle(flags: Mapping[str, str], *, only: Collection[str] | None = None) -> Settings:
    """The settings of this process: its flags, its environment, this machine's files.

    Raises:
        ConfigurationError: with every problem.
    """
    run_dir = default_run_directory(os.environ, uid=os.geteuid())
    defaults = Defaults(model=demo_model_directory(), run_dir=run_dir)
    return resolve(flags=flags, environ=os.environ, defaults=defaults, only=only)


def settle_with_model(flags: Mapping[str, str]) -> Settings:
    """The settings, and a look at the model directory they name, with the problems of both.

    Raises:
        ConfigurationError: with every problem.
    """
    from understudy.runtime.model.encoder_config import read_config

    problems: list[str] = []
    settings: Settings | None = None
    try:
        settings = settle(flags)
    except ConfigurationError as error:
        problems.extend(error.problems)
    try:
        read_config(settle(flags, only=("model",)).values["model"])
    except ConfigurationError as error:
        problems.extend(problem for problem in error.problems if problem not in problems)
    if problems or settings is None:
        raise ConfigurationError(*problems)
    return settings


def show(flags: Mapping[str, str], *, with_origin: bool) -> int:
    """Print every setting as TOML; what has no value is commented out."""
    settings = settle(flags)
    for name, setting in SETTINGS.items():
        value = settings.values[name]
        if name in SECRETS and value is not None:
            value = "(hidden)"
        line = f"{name.replace('_', '-')} = {_toml(value)}"
        if value is None:
            line = f"# {name.replace('_', '-')} is not set: {setting.help}"
        if with_origin:
            line = f"{line:<56} # {settings.origins[name]}"
        print(line)
    return 0


def check(flags: Mapping[str, str]) -> int:
    """Look for mistakes; whoever calls tells them."""
    settle_with_model(flags)
    print("the configuration is valid", file=sys.stderr)
    return 0


def _toml(value: Any) -> str:
    """A value in TOML, whose basic strings are JSON's."""
    return json.dumps(str(value) if isinstance(value, Path) else value)
