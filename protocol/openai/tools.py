"""The tools that a model may call: a body's fields to what templates, parsers and grammars need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.sampling import ModelTraits

TOOLS_MAX: Final = 128
DESCRIPTION_BYTES_MAX: Final = 64 << 10
SCHEMA_BYTES_MAX: Final = 64 << 10
SCHEMA_DEPTH_MAX: Final = 32
TOOLS_BYTES_MAX: Final = 256 << 10

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class FunctionTool(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """A tool; only functions are served."""

    function: FunctionTool
    type: Literal["function"] = "function"


class FunctionName(msgspec.Struct, frozen=True):
    """Names one function."""

    name: str


class NamedTool(msgspec.Struct, frozen=True):
    """As ``tool_choice``: this one is to be called."""

    function: FunctionName
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request, checked."""

    tools: tuple[FunctionTool, ...]
    is_forced: bool
    """Whether an answer has to be a call."""
    forced_name: str | None
    """Of the only tool that may be called then."""
    is_parallel: bool
    """Whether an answer may have several calls."""

    @property
    def calls_max(self) -> int:
        """Calls in one answer; 0: as many as the model likes."""
        return 0 if self.is_parallel and self.forced_name is None else 1

    @property
    def callable_tools(self) -> tuple[FunctionTool, ...]:
        """Those that may be called."""
        if self.forced_name is None:
            return self.tools
        return tuple(tool for tool in self.tools if tool.name == self.forced_name)

    def shown(self) -> list[dict[str, Any]]:
        """The tools as chat templates show them."""
        return [_shown(tool) for tool in self.tools]


def check_tools(
    tools: list[Tool] | None,
    choice: ToolChoice | None,
    *,
    parallel: bool | None,
    model: ModelTraits,
) -> ToolUse | None:
    """Check what a body says of tools; ``None`` if it wants no call.

    Raises:
        InvalidRequest: a tool is none, or this server cannot do what is asked for.
    """
    if not tools:
        if choice in {None, "none", "auto"}:
            return None
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    if len(tools) > TOOLS_MAX:
        raise InvalidRequest(f"tools: at most {TOOLS_MAX}", param="tools")
    names: set[str] = set()
    size = 0
    for index, tool in enumerate(tools):
        size += _check_function(tool.function, names, f"tools[{index}].function")
    if size > TOOLS_BYTES_MAX:
        raise InvalidRequest(f"tools: at most {TOOLS_BYTES_MAX} bytes together", param="tools")
    forced_name = choice.function.name if isinstance(choice, NamedTool) else None
    if forced_name is not None and forced_name not in names:
        raise InvalidRequest("tool_choice names no tool", param="tool_choice")
    if choice == "none":
        return None
    if not model.tool_parser:
        raise InvalidRequest(
            "this server does not know how the model calls tools (--tool-call-parser)",
            param="tools",
        )
    is_forced = choice == "required" or forced_name is not None
    return ToolUse(
        tools=tuple(tool.function for tool in tools),
        is_forced=is_forced,
        forced_name=forced_name,
        is_parallel=parallel is not False,
    )


def _check_function(tool: FunctionTool, names: set[str], param: str) -> int:
    """Check one tool; give its size."""
    if not _NAME.fullmatch(tool.name):
        raise InvalidRequest(
            f"{param}.name must be 1 to 64 letters, digits, dots, dashes or underscores",
            param=f"{param}.name",
        )
    if tool.name in names:
        raise InvalidRequest(f"{param}.name is there twice", param=f"{param}.name")
    names.add(tool.name)
    described = len((tool.description or "").encode())
    if described > DESCRIPTION_BYTES_MAX:
        raise InvalidRequest(f"{param}.description is too long", param=f"{param}.description")
    if tool.parameters is None:
        return described
    param = f"{param}.parameters"
    schema = tool.parameters
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"{param} must describe an object", param=param)
    if _depth(schema) > SCHEMA_DEPTH_MAX:
        raise InvalidRequest(f"{param} is nested too deeply", param=param)
    size = len(msgspec.json.encode(schema))
    if size > SCHEMA_BYTES_MAX:
        raise InvalidRequest(f"{param}: at most {SCHEMA_BYTES_MAX} bytes", param=param)
    return described + size


def _depth(value: object) -> int:
    """How deep containers are nested, up to one more than may be."""
    depth = 0
    level: list[object] = [value]
    while level and depth <= SCHEMA_DEPTH_MAX:
        containers: list[Any] = [one for one in level if isinstance(one, dict | list)]
        level = [
            child
            for one in containers
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        depth += bool(containers)
    return depth


def _shown(tool: FunctionTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    return {"type": "function", "function": function}


def schema_of(tool: FunctionTool) -> Mapping[str, Any]:
    """What the arguments of a tool must look like; any object if it does not say."""
    schema = dict(tool.parameters or {})
    schema.setdefault("type", "object")
    return schema
