"""A model's chat template: messages to the text that the model was trained on.

Templates come with a model and are not trusted: they run in Jinja's immutable sandbox, with what
``transformers`` gives them and nothing else, so that the text is the same as there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from understudy.protocol.errors import ConfigurationError, InvalidRequest

TEMPLATE_BYTES_MAX: Final = 1 << 20
_CONTINUE_MARK: Final = "UNDERSTUDY_CONTINUES_HERE "
_RENDER_ERRORS: Final = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template raises over messages that it was not written for."""

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template.

    Args:
        source: The template.
        special_tokens: The model's named special tokens, which templates may print.

    Attributes:
        source: The template.
        shows_tools: Whether it has a place for tools.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.shows_tools = "tools" in source
        self._template = _environment().from_string(source)
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source
        self._takes_parts = self._renders_parts()

    @classmethod
    def from_directory(
        cls, path: Path, *, configured: str | None, special_tokens: Mapping[str, str]
    ) -> ChatTemplate | None:
        """Compile ``chat_template.jinja``, else the ``configured`` one; ``None`` without either.

        Raises:
            ConfigurationError: the template is too large or no Jinja.
        """
        file_path = path / "chat_template.jinja"
        source = configured
        try:
            if file_path.is_file():
                source = file_path.read_text(encoding="utf-8")
            if source is None:
                return None
            if len(source) > TEMPLATE_BYTES_MAX:
                raise ConfigurationError(f"{path}: the chat template is too large")
            return cls(source, special_tokens)
        except (OSError, UnicodeDecodeError, TemplateError) as error:
            raise ConfigurationError(f"{path}: no chat template: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text for a conversation.

        Args:
            messages: With ``role``, ``content`` (a string, or a list of text parts), and what
                else the client sent. The developer's role becomes the system's where the
                template does not know it; parts become one string where it cannot read them.
            add_generation_prompt: Whether the model's turn is opened at the end.
            continue_final_message: Whether the text stops inside the last message.
            tools: What the model may call.
            kwargs: Further variables for the template.

        Raises:
            InvalidRequest: the template refuses these messages.
        """
        shown = [self._adapt(message) for message in messages]
        if continue_final_message:
            _mark_end(shown[-1])
        try:
            text = self._render(
                shown, add_generation_prompt=add_generation_prompt, tools=tools, **kwargs or {}
            )
        except _RENDER_ERRORS as error:
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {error}",
                param="messages",
            ) from error
        return _cut_at_mark(text) if continue_final_message else text

    def _render(self, messages: Sequence[Message], **variables: Any) -> str:
        variables = {"tools": None, "documents": None, **self._special_tokens, **variables}
        return self._template.render(messages=messages, **variables)

    def _adapt(self, message: Message) -> dict[str, Any]:
        shown = dict(message)
        if shown["role"] == "developer" and not self._knows_developer:
            shown["role"] = "system"
        content = shown["content"]
        if not isinstance(content, str) and not self._takes_parts:
            shown["content"] = "\n".join(part["text"] for part in content)
        return shown

    def _renders_parts(self) -> bool:
        """Whether the template reads a list of parts; found by asking it.

        One that expects a string fails, or prints the list.
        """
        parts = [{"type": "text", "text": "first part"}, {"type": "text", "text": "second part"}]
        try:
            text = self._render([{"role": "user", "content": parts}], add_generation_prompt=True)
        except _RENDER_ERRORS:
            return False
        return "first part" in text and "second part" in text and "'type'" not in text


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks the model's own words for training.

    Serving prints what is inside.
    """

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _format_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _format_now(format: str) -> str:  # noqa: A002 - the name that templates know
    return datetime.now(tz=UTC).astimezone().strftime(format)


def _mark_end(message: dict[str, Any]) -> None:
    """Put a mark behind the text of the message that the model is to go on with."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_MARK
        return
    if not content:
        raise InvalidRequest("continue_final_message: the last message is empty", param="messages")
    last = {**content[-1], "text": content[-1]["text"] + _CONTINUE_MARK}
    message["content"] = [*content[:-1], last]


def _cut_at_mark(text: str) -> str:
    """The text up to the mark. A template that trims a message has taken the mark's space."""
    cut = text.rfind(_CONTINUE_MARK.strip())
    if cut < 0:
        raise InvalidRequest(
            "continue_final_message: the model's chat template does not show the last message",
            param="continue_final_message",
        )
    if text.startswith(_CONTINUE_MARK, cut):
        return text[:cut]
    return text[:cut].rstrip()
