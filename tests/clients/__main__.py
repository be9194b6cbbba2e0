"""Real clients, as people install them, against one real server: ``python -m tests.clients``.

Each client gets an environment of its own, into which its package manager installs the newest
version; it is kept for the next time. Then its script in ``scripts`` runs against two engines with
the bundled model. Exit status: 0; 1 if a check failed; 69 if a client was not to be had.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from tests.cluster import Cluster, running_cluster
from understudy.runtime.exit_status import ExitStatus
from understudy.tools.demo.paths import demo_model_directory

MODEL: Final = "understudy-demo"
SCRIPTS: Final = Path(__file__).parent / "scripts"
INSTALL_MAX_S: Final = 1200.0
RUN_MAX_S: Final = 600.0
TAIL_LINES: Final = 12
ROW: Final = "{name:<18} {version:<10} {checks:>9} {seconds:>8}"


class Client(NamedTuple):
    """A client, and the script that tries it."""

    packages: tuple[str, ...]
    """What is installed; the first is the client."""
    script: str


CLIENTS: Final[Mapping[str, Client]] = {
    "openai": Client(("openai",), "openai_python.py"),
    "openai-node": Client(("openai",), "openai_node.mjs"),
    "anthropic": Client(("anthropic",), "anthropic_python.py"),
    "langchain-openai": Client(("langchain-openai",), "langchain_chat.py"),
    # It imports mcp for calls of tools, and does not ask for it.
    "litellm": Client(("litellm", "mcp"), "litellm_library.py"),
    "llm": Client(("llm",), "llm_command.py"),
    "lm-eval": Client(("lm-eval[api]",), "lm_eval_tasks.py"),
    "guidellm": Client(("guidellm",), "guidellm_benchmark.py"),
}


class Outcome(NamedTuple):
    """What became of one client."""

    version: str = ""
    num_checks: int = 0
    problems: tuple[str, ...] = ()
    not_to_be_had: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients")
    parser.add_argument("names", nargs="*", metavar="CLIENT", help=f"of {', '.join(CLIENTS)}")
    parser.add_argument(
        "--environments",
        type=Path,
        default=_cache() / "understudy" / "clients",
        help="where clients are installed (%(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="install them again")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - CLIENTS.keys()
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    outcomes: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory(prefix="understudy-clients-") as scratch,
        running_cluster("--tool-call-parser=hermes", engines=2, engine="model") as cluster,
    ):
        print(ROW.format(name="client", version="version", checks="checks", seconds="seconds"))
        for name in arguments.names or CLIENTS:
            folder = arguments.environments / name
            if arguments.fresh:
                shutil.rmtree(folder, ignore_errors=True)
            began_at = time.monotonic()
            outcome = _try(CLIENTS[name], folder, cluster, Path(scratch))
            _tell(name, outcome, time.monotonic() - began_at)
            outcomes.append(outcome)
    if any(outcome.problems for outcome in outcomes):
        return ExitStatus.FAILED
    if any(outcome.not_to_be_had for outcome in outcomes):
        return ExitStatus.UNAVAILABLE
    return ExitStatus.DONE


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _tell(name: str, outcome: Outcome, seconds: float) -> None:
    num_good = outcome.num_checks - len(outcome.problems)
    checks = f"{num_good}/{outcome.num_checks}" if outcome.num_checks else "-"
    print(ROW.format(name=name, version=outcome.version, checks=checks, seconds=f"{seconds:.1f}"))
    for problem in outcome.problems:
        print(f"    failed: {problem}")
    if outcome.not_to_be_had:
        print(f"    not to be had: {outcome.not_to_be_had}")
    sys.stdout.flush()


def _try(client: Client, folder: Path, cluster: Cluster, scratch: Path) -> Outcome:
    """Install a client if it is not there, and run its script."""
    is_node = client.script.endswith(".mjs")
    if not (folder / "installed").exists():
        reason = _install_node(client, folder) if is_node else _install_python(client, folder)
        if reason:
            return Outcome(not_to_be_had=reason)
        (folder / "installed").touch()
    version = _version_of_node(client, folder) if is_node else _version_of_python(client, folder)
    results = scratch / f"{folder.name}.jsonl"
    script = str(SCRIPTS / client.script)
    words = (
        ["node", script]
        if is_node
        else [
            *(str(folder / "bin/python"), "-P", str(SCRIPTS / "drive.py"), script),
        ]
    )
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = kept | {
        "SERVER_URL": cluster.base_url,
        "MODEL": MODEL,
        "MODEL_DIRECTORY": str(demo_model_directory()),
        "SCRATCH": str(scratch),
    }
    ended = _run([*words, str(results)], RUN_MAX_S, folder=folder, environment=environment)
    found = []
    if results.exists():
        found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    problems = [f"{one['name']}: {one['problem'][-500:]}" for one in found if one["problem"]]
    num_checks = len(found)
    if ended or not found:
        problems.append(f"the script did not reach its end: {ended}")
        num_checks += 1
    return Outcome(version, num_checks, tuple(problems))


def _install_python(client: Client, folder: Path) -> str:
    """Make an environment; gives why that is not possible, or nothing."""
    python = str(folder / "bin/python")
    return _run([sys.executable, "-m", "venv", "--clear", str(folder)], INSTALL_MAX_S) or _run(
        [python, "-m", "pip", "install", "--quiet", *client.packages], INSTALL_MAX_S
    )


def _install_node(client: Client, folder: Path) -> str:
    if shutil.which("npm") is None:
        return "there is no npm on this machine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
    words = ["npm", "install", "--no-audit", "--no-fund", *client.packages]
    return _run(words, INSTALL_MAX_S, folder=folder)


def _version_of_python(client: Client, folder: Path) -> str:
    [info] = (folder / "lib").glob(
        f"python*/site-packages/{_normalised(client.packages[0])}-*.dist-info"
    )
    return info.name.removesuffix(".dist-info").rpartition("-")[2]


def _normalised(package: str) -> str:
    """A package's name as its folder of metadata has it."""
    return package.partition("[")[0].replace("-", "_")


def _version_of_node(client: Client, folder: Path) -> str:
    described = folder / "node_modules" / client.packages[0] / "package.json"
    return str(json.loads(described.read_text(encoding="utf-8"))["version"])


def _run(
    words: list[str],
    seconds_max: float,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command; gives the end of what it said if it failed, or nothing."""
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds_max,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {seconds_max:.0f} s"
    if done.returncode == 0:
        return ""
    lines = (done.stdout + done.stderr).strip().splitlines()[-TAIL_LINES:]
    return "\n    ".join([f"exit status {done.returncode}", *lines])


if __name__ == "__main__":
    sys.exit(main())
