"""The ``understudy`` command: reads its arguments and hands over to what does the work.

``understudy status`` has to answer in less than 200 ms, and most of that is imports: so this
module imports next to nothing, and each command imports what it needs when it runs.

Data goes to stdout, messages go to stderr. Exit statuses: 0 done, 1 failed, 2 wrong usage,
69 unavailable, 75 try again, 78 wrong configuration; ``status`` has its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.exit_status import ExitStatus
from understudy.runtime.settings import SETTINGS

_EVERY_SETTING: Final = tuple(SETTINGS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser(words[:1]).parse_args(words)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except ConfigurationError as error:
        for problem in error.problems:
            print(f"understudy: {problem}", file=sys.stderr)
        return ExitStatus.CONFIG
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command: its help, and the functions that add its arguments and run it."""

    help: str
    example: str
    add: Callable[[argparse.ArgumentParser], None]


class _Parser(argparse.ArgumentParser):
    """A parser whose help starts with an example, which most readers need and nothing more."""

    def __init__(self, *, example: str = "", **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._example = example

    def format_help(self) -> str:
        example = f"example: {self._example}\n\n" if self._example else ""
        return example + super().format_help()


def _parser(chosen: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the chosen command only: others need not be imported."""
    parser = _Parser(
        prog="understudy",
        example="understudy start --model ~/models/Qwen2.5-0.5B-Instruct",
        description="Serve a language model with actors that stand in for one another.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and end")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        child = commands.add_parser(
            name, help=command.help, description=command.help + ".", example=command.example
        )
        if name in chosen:
            command.add(child)
    return parser


class _Version(argparse.Action):
    """Shows the version of the installed package, which takes a while to find."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"understudy {version('understudy')}")
        parser.exit()


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add the flags of these settings, under their headings; those without one are not shown."""
    groups: dict[str, Any] = {}
    for name in names:
        setting = SETTINGS[name]
        place: Any = parser
        if setting.group is not None:
            if setting.group not in groups:
                groups[setting.group] = parser.add_argument_group(setting.group)
            place = groups[setting.group]
        shown = setting.help
        if setting.default is not None:
            shown += f" ({setting.default})"
        place.add_argument(
            setting.flag,
            dest=name,
            metavar=setting.metavar,
            help=argparse.SUPPRESS if setting.group is None else shown,
        )
    parser.add_argument("--config", metavar="FILE", help="read this TOML file, not /etc/understudy")


def flags_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings that were given as flags."""
    given = {name: getattr(arguments, name, None) for name in (*SETTINGS, "config")}
    return {name: value for name, value in given.items() if value is not None}


def _add_start(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser, _EVERY_SETTING)
    parser.epilog = "More settings, for TOML and the environment: understudy config show."
    parser.add_argument(
        "--detach", action="store_true", help="go on in the background once it is ready"
    )

    def run(arguments: argparse.Namespace) -> int:
        from understudy.tools.start import start

        return start(flags_of(arguments), is_detached=arguments.detach)

    parser.set_defaults(run=run)


def _add_stop(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser, ["run_dir"])

    def run(arguments: argparse.Namespace) -> int:
        from understudy.tools.control import stop

        return stop(flags_of(arguments))

    parser.set_defaults(run=run)


def _add_drain(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser, ["run_dir"])
    parser.add_argument("engine", metavar="ENGINE", help="its name, as status shows it")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--migrate", action="store_true", help="its requests go on elsewhere, at once (default)"
    )
    how.add_argument("--finish", action="store_true", help="its requests end where they are")
    parser.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="S", help="seconds to wait (60)"
    )
    parser.epilog = "Exit status: 0 it rests, 75 it still has requests, 69 not running."

    def run(arguments: argparse.Namespace) -> int:
        from understudy.tools.change import drain

        return drain(
            flags_of(arguments),
            arguments.engine,
            finishes=arguments.finish,
            timeout_s=arguments.timeout,
        )

    parser.set_defaults(run=run)


def _add_restart(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser, ["run_dir"])
    parser.add_argument(
        "--rolling",
        action="store_true",
        required=True,
        help="one process at a time: what is new is ready before what is old ends",
    )

    def run(arguments: argparse.Namespace) -> int:
        from understudy.tools.change import restart

        return restart(flags_of(arguments))

    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.0 <= seconds <= 86_400.0:
        raise ValueError
    return seconds


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser, ["run_dir"])
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.epilog = "Exit status: 0 serving, 1 degraded, 3 not running, 4 unknown."

    def run(arguments: argparse.Namespace) -> int:
        from understudy.tools.control import status

        return status(flags_of(arguments), as_json=arguments.json)

    parser.set_defaults(run=run)


def _add_config(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser(
        "show", help="every setting, as TOML", example="understudy config show"
    )
    _add_settings(show, _EVERY_SETTING)
    show.add_argument("--origin", action="store_true", help="say where each value comes from")
    check = actions.add_parser(
        "check", help="look for mistakes and end with 78 on any", example="understudy config check"
    )
    _add_settings(check, _EVERY_SETTING)

    def run_show(arguments: argparse.Namespace) -> int:
        from understudy.tools.configuration import show

        return show(flags_of(arguments), with_origin=arguments.origin)

    def run_check(arguments: argparse.Namespace) -> int:
        from understudy.tools.configuration import check

        return check(flags_of(arguments))

    show.set_defaults(run=run_show)
    check.set_defaults(run=run_check)


def _add_journal(parser: argparse.ArgumentParser) -> None:
    from understudy.tools import journal

    journal.add_arguments(parser)


def _add_quarantine(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for action, text in (
        ("list", "what is in quarantine"),
        ("show", "what one of them asked, as JSON: its prompt is in it"),
        ("release", "let the same be asked again"),
    ):
        words = "" if action == "list" else " 4be1c7"
        child = actions.add_parser(
            action, help=text, example=f"understudy quarantine {action}{words}"
        )
        _add_settings(child, ["run_dir", "state_dir"])
        if action != "list":
            child.add_argument("fingerprint", help="its first digits, as in the list")

        def run(arguments: argparse.Namespace, action: str = action) -> int:
            from understudy.tools import quarantine

            flags = flags_of(arguments)
            if action == "list":
                return quarantine.list_all(flags)
            act = quarantine.show if action == "show" else quarantine.release
            return act(flags, arguments.fingerprint)

        child.set_defaults(run=run)


def _add_keys(parser: argparse.ArgumentParser) -> None:
    from understudy.tools import keys

    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    made = actions.add_parser(
        "add", help="make a key and print it, once", example="understudy keys add acme --weight 4"
    )
    made.add_argument("tenant", help="whose it is")
    keys.add_arguments(made)
    made.set_defaults(run=lambda arguments: keys.add(flags_of(arguments), arguments))
    listed = actions.add_parser("list", help="what is known", example="understudy keys list")
    listed.set_defaults(run=lambda arguments: keys.list_all(flags_of(arguments)))
    revoked = actions.add_parser(
        "revoke", help="let nobody in with it any more", example="understudy keys revoke k3f29c1a"
    )
    revoked.add_argument("key_id", metavar="KEY", help="as the list shows it")
    revoked.set_defaults(run=lambda arguments: keys.revoke(flags_of(arguments), arguments.key_id))
    for action in (made, listed, revoked):
        _add_settings(action, [])
        shown = "the key file, unless the configuration names it"
        action.add_argument("--key-file", metavar="FILE", help=shown)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stay", action="store_true", help="go on serving after the answer")

    def run(arguments: argparse.Namespace) -> int:
        from understudy.tools.demonstration import demonstrate

        return demonstrate(stays=arguments.stay)

    parser.set_defaults(run=run)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from understudy.tools.bench import serve, start, step, sweep

    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for module, name, words, example in (
        (serve, "serve", "load a running server and measure it", " --concurrency 16"),
        (sweep, "sweep", "one load after another on a running server", " --concurrency 1,4,16"),
        (step, "step", "an engine's steps, without servers", " --batch-sizes 1,8,32"),
        (start, "start", "from start to ready to first token", " --num-starts 5"),
    ):
        child = kinds.add_parser(name, help=words, example=f"understudy bench {name}{example}")
        module.add_arguments(child)
        child.set_defaults(run=module.run)


def _actor(role: str) -> Callable[[argparse.ArgumentParser], None]:
    """What adds the arguments of a command that is one actor in the foreground."""

    def add(parser: argparse.ArgumentParser) -> None:
        from understudy.runtime import config

        kinds = {
            "supervisor": config.SupervisorConfig,
            "engine": config.EngineConfig,
            "gateway": config.GatewayConfig,
        }
        _add_settings(parser, config.settings_of(kinds[role]))
        if role != "supervisor":
            parser.add_argument(
                "--name", default=f"{role}-0", help=f"its name in the cluster ({role}-0)"
            )
        # For the launcher, which starts this command: whose death it shall not outlive, where to
        # leave its last message, and which of its open files is the socket to listen on.
        parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
        parser.add_argument("--last-words", type=Path, help=argparse.SUPPRESS)
        if role == "gateway":
            parser.add_argument("--listen-fd", type=int, help=argparse.SUPPRESS)

        def run(arguments: argparse.Namespace) -> int:
            from understudy.tools.actor import run_actor

            return run_actor(
                role,
                getattr(arguments, "name", role),
                flags_of(arguments),
                parent_pid=arguments.parent_pid,
                last_words=arguments.last_words,
                listen_fd=getattr(arguments, "listen_fd", None),
            )

        parser.set_defaults(run=run)

    return add


COMMANDS: Final = {
    "start": Command(
        help="start a supervisor, engines and a gateway on this machine",
        example="understudy start --model ~/models/Qwen2.5-0.5B-Instruct --data-parallel-size 2",
        add=_add_start,
    ),
    "stop": Command(help="let streams finish, then stop", example="understudy stop", add=_add_stop),
    "status": Command(help="say how it is", example="understudy status --json", add=_add_status),
    "drain": Command(
        help="give an engine nothing new, and move away or finish what it has",
        example="understudy drain engine-0",
        add=_add_drain,
    ),
    "restart": Command(
        help="replace every process, and let every stream go on",
        example="understudy restart --rolling",
        add=_add_restart,
    ),
    "demo": Command(
        help="kill -9 an engine in the middle of its answer, and see the answer go on",
        example="understudy demo",
        add=_add_demo,
    ),
    "bench": Command(
        help="measure", example="understudy bench serve --concurrency 16", add=_add_bench
    ),
    "journal": Command(
        help="look into a supervisor's journal",
        example="understudy journal verify /run/understudy/state/journal",
        add=_add_journal,
    ),
    "quarantine": Command(
        help="requests that engines died of",
        example="understudy quarantine list",
        add=_add_quarantine,
    ),
    "keys": Command(
        help="whose calls are let in", example="understudy keys add acme", add=_add_keys
    ),
    "config": Command(
        help="show or check the configuration",
        example="understudy config show --origin",
        add=_add_config,
    ),
    "supervisor": Command(
        help="run a supervisor alone, in the foreground",
        example="understudy supervisor --run-dir /run/understudy",
        add=_actor("supervisor"),
    ),
    "engine": Command(
        help="run one engine alone, in the foreground",
        example="understudy engine --name engine-0 --run-dir /run/understudy",
        add=_actor("engine"),
    ),
    "gateway": Command(
        help="run one gateway alone, in the foreground",
        example="understudy gateway --name gateway-0 --port 8000",
        add=_actor("gateway"),
    ),
}

if __name__ == "__main__":
    sys.exit(main())
