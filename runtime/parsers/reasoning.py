"""What a model thinks before it answers, between two marks.

Templates often open the thinking themselves, at the end of the prompt, or close it at once for a
model that is not to think; so where an answer begins is seen in the prompt.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from understudy.protocol.openai.deltas import ContentDelta, Delta, ReasoningDelta
from understudy.runtime.parsers.prose import Marks


class ReasoningFormat(NamedTuple):
    """How a family of models thinks."""

    opening: str
    closing: str
    is_always_thinking: bool = False
    """Whether an answer begins with thoughts even if nothing opens them."""


FORMATS: Final = {
    "deepseek_r1": ReasoningFormat("<think>", "</think>", is_always_thinking=True),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "qwen3": ReasoningFormat("<think>", "</think>"),
}


def begins_inside(name: str, prompt: str, *, begun: str | None = None) -> bool:
    """Whether the answer to a prompt goes on, or begins, inside the thoughts.

    Only the end of the prompt counts: what the user says has no say in it. ``begun`` is the
    beginning of the answer, if the prompt holds one.
    """
    form = FORMATS[name]
    if begun is not None:
        is_closed = form.closing in begun
        is_open = begun.rfind(form.opening) > begun.rfind(form.closing)
        return is_open or (form.is_always_thinking and not is_closed)
    prompt = prompt.rstrip()
    if prompt.endswith(form.closing):
        return False
    return form.is_always_thinking or prompt.endswith(form.opening)


class ReasoningParser:
    """Tells thoughts from the answer. Spaces around the marks belong to neither.

    Args:
        name: Of the format.
        is_inside: Whether the text begins inside the thoughts.
    """

    def __init__(self, name: str, *, is_inside: bool) -> None:
        form = FORMATS[name]
        self._opening = form.opening
        self._closing = Marks(form.closing)
        self._state = "thoughts" if is_inside else "start"
        self._is_at_start = True
        self._may_open = True
        self._held = ""
        self._pending = ""

    @property
    def is_thinking(self) -> bool:
        """Whether the text is inside the thoughts."""
        return self._state == "thoughts"

    def push(self, text: str) -> list[Delta]:
        """What more of the text means: reasoning, or content that may mean something yet."""
        deltas: list[Delta] = []
        self._pending += text
        if self._state == "start":
            self._look_for_opening()
        if self._state == "thoughts":
            self._think(deltas)
        if self._state == "answer" and self._pending:
            if self._is_at_start:
                self._pending = self._pending.lstrip()
            if self._pending:
                self._is_at_start = False
                deltas.append(ContentDelta(self._pending))
                self._pending = ""
        return deltas

    def finish(self) -> list[Delta]:
        """What was held back."""
        rest, self._pending = self._held + self._pending, ""
        if not rest:
            return []
        return [ContentDelta(rest) if self._state == "start" else ReasoningDelta(rest)]

    def _look_for_opening(self) -> None:
        rest = self._pending.lstrip()
        if rest.startswith(self._opening):
            self._pending = rest[len(self._opening) :]
            self._state = "thoughts"
            self._may_open = False
        elif not self._opening.startswith(rest):
            self._state = "answer"
            self._is_at_start = False  # spaces before an answer without thoughts are its own

    def _think(self, deltas: list[Delta]) -> None:
        if self._is_at_start:
            rest = self._pending.lstrip()
            if self._may_open and rest.startswith(self._opening):
                rest = rest[len(self._opening) :].lstrip()  # opened by prompt and model
                self._may_open = False
            elif self._may_open and self._opening.startswith(rest):
                return
            self._pending = rest
            self._is_at_start = not rest
        text, mark, self._pending = self._closing.cut(self._pending)
        text = self._held + text
        kept = text.rstrip()
        self._held = text[len(kept) :] if mark is None else ""
        if kept:
            deltas.append(ReasoningDelta(kept))
        if mark is not None:
            self._state = "answer"
            self._is_at_start = True
