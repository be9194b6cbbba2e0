"""Hold the served API to its own document: ``python -m tests.abuse.schema [--examples 50]``.

Runs schemathesis (https://schemathesis.readthedocs.io) from an environment of its own in the cache
directory, which is made first if need be: it brings a great many packages, which nothing else here
asks for.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

from tests.abuse.stage import on_stage
from understudy.runtime.cache import cache_directory

REQUIREMENT: Final = "schemathesis>=4.32,<5"
CHECKS: Final = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "ignored_auth",
    "use_after_free",
)
"""All but one: what the document allows may be refused, for it has no words for every limit."""


def main() -> int:
    """Run it; its own exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.abuse.schema")
    parser.add_argument("--examples", type=int, default=50, help="of each operation (50)")
    parser.add_argument("--seed", type=int, default=1, help="another one gives other calls (1)")
    parser.add_argument("--path", help="of the one operation to be tried")
    parser.add_argument("--minutes", type=int, default=10, help="at most (10)")
    given = parser.parse_args()
    command = _installed()
    with on_stage("--echo-tokens-per-s=0", "--max-model-len=256") as stage:
        done = subprocess.run(
            [
                *(str(command), "run", f"{stage.base_url}/openapi.json"),
                *("--header", f"Authorization: Bearer {stage.hostile_key}"),
                *("--checks", ",".join(CHECKS), "--max-examples", str(given.examples)),
                *("--seed", str(given.seed), "--request-timeout", "60", "--no-color"),
                *("--max-time", str(given.minutes * 60), "--continue-on-failure"),
                *(() if given.path is None else ("--include-path", given.path)),
                *("--suppress-health-check", "all", "--generation-database", "none"),
            ],
            check=False,
            cwd=command.parent,  # it keeps what failed below where it runs
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )
        problems = stage.problems()
    for problem in problems:
        print(f"FOUND {problem}", file=sys.stderr)
    return done.returncode or bool(problems)


def _installed() -> Path:
    """The command, installed."""
    directory = cache_directory() / "schemathesis"
    command = directory / "bin" / "schemathesis"
    if not command.exists():
        venv.create(directory, with_pip=True)
        pip = directory / "bin" / "pip"
        subprocess.run([str(pip), "install", "--quiet", REQUIREMENT], check=True)
    return command


if __name__ == "__main__":
    sys.exit(main())
