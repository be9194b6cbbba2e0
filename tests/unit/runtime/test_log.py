"""Log records: one line each, nothing of a user's words, the same form for libraries."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from understudy.runtime.log import configure_logging, get_logger, where_it_failed


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    handlers, level = logging.root.handlers, logging.root.level
    yield
    logging.root.handlers = handlers
    logging.root.setLevel(level)
    logging.getLogger("aiohttp.access").disabled = False
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_off_a_terminal_a_record_is_one_line_of_json() -> None:
    stream = io.StringIO()
    configure_logging("engine-0", stream=stream)
    get_logger().info("loaded\nand ready", blocks=3)
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record.pop("timestamp").endswith("Z")
    assert record == {
        "actor": "engine-0",
        "blocks": 3,
        "event": "loaded\nand ready",
        "level": "info",
    }


def test_an_exception_stays_on_its_records_line() -> None:
    stream = io.StringIO()
    configure_logging("engine-0", stream=stream)
    try:
        raise ValueError("x")
    except ValueError:
        get_logger().exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["exception"].endswith("ValueError: x")


def test_on_a_terminal_nothing_can_forge_a_second_record() -> None:
    stream = Terminal()
    configure_logging("gateway-0", stream=stream)
    get_logger().info("hello\n2026 [info] forged", name="\x1b[2J")
    (line,) = stream.getvalue().splitlines()
    assert "\\n2026" in line
    assert "\x1b[2J" not in line


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    configure_logging("gateway-0", stream=stream)
    get_logger().info("hello")
    assert "\x1b" not in stream.getvalue()


def test_what_a_user_wrote_is_withheld() -> None:
    stream = io.StringIO()
    configure_logging("gateway-0", stream=stream)
    get_logger().info("submitted", prompt="my secret", tokens=(1, 2), request_id=7)
    assert "secret" not in stream.getvalue()
    record = json.loads(stream.getvalue())
    assert record["prompt"] == record["tokens"] == "[withheld]"
    assert record["request_id"] == 7


def test_libraries_come_out_in_the_same_form_from_warnings_upwards() -> None:
    stream = io.StringIO()
    configure_logging("gateway-0", stream=stream)
    logging.getLogger("asyncio").info("too much detail")
    logging.getLogger("aiohttp.access").warning("GET /secret")
    logging.getLogger("asyncio").warning("slow %s", "callback")
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert (record["event"], record["logger"], record["level"]) == (
        "slow callback",
        "asyncio",
        "warning",
    )


def test_where_something_failed_is_told_without_what_it_said() -> None:
    def fail() -> None:
        raise ValueError("what a client sent")

    with pytest.raises(ValueError, match="sent") as failed:
        fail()
    told = where_it_failed(failed.value)
    assert told.endswith("ValueError")
    assert " in fail" in told
    assert "sent" not in told
