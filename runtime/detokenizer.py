"""Token ids to text, as they come, up to a stop string.

A character may be spread over tokens, and so may a stop string; text is given out as soon as it
can be neither. What was given out after the first n tokens depends on those n tokens alone, not
on how they were grouped, so a detokenizer is rebuilt by replaying tokens to a new one.

``tokenizers.decoders.DecodeStream`` does the first half of this, but it decodes everything since
the last whole character again for each token: a model that is made to emit bytes that are no
UTF-8 would cost it quadratic time (1.2 ms for a token after 4,000 of them).
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from understudy.protocol.request import FinishReason
from understudy.runtime.tokenizer import Tokenizer


class StopMatch(NamedTuple):
    """Where a stop string lies in a text."""

    start: int
    end: int


class StopStrings:
    """Looks for the stop string that is complete first; of several, the longest."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        assert all(strings)
        self._strings = strings

    def find(self, text: str) -> StopMatch | None:
        """The match that ends first in ``text``."""
        matches = [
            StopMatch(start, start + len(string))
            for string in self._strings
            if (start := text.find(string)) >= 0
        ]
        return min(matches, key=lambda match: (match.end, match.start), default=None)

    def held_length(self, text: str) -> int:
        """The length of the longest end of ``text`` that may be the beginning of a stop string."""
        longest = 0
        for string in self._strings:
            start = text.find(string[0], max(0, len(text) - len(string) + 1))
            while start >= 0 and len(text) - start > longest:
                if string.startswith(text[start:]):
                    longest = len(text) - start
                start = text.find(string[0], start + 1)
        return longest


class Searched(NamedTuple):
    """What a search for stop strings lets out."""

    text: str
    is_stopped: bool


class TextDelta(NamedTuple):
    """What a push made known."""

    text: str
    num_tokens: int
    """How many of the pushed tokens count: all, or those up to the end of a stop string."""
    is_stopped: bool
    """A stop string is complete. Nothing may be pushed any more."""


class Detokenizer:
    """Makes the text of one answer.

    Args:
        tokenizer: The model's.
        prompt: What the answer goes on from. It matters to tokenizers that drop a text's first
            space: an answer's first space stays, unless nothing is before it.
        stop: Strings at which the text ends.
        include_stop: Whether the stop string, or the stop token, is itself part of the text.
        min_tokens: Stop strings are looked for behind so many tokens.
        marks: Special tokens that the text shows.

    Attributes:
        num_characters: The length of the text of all tokens so far, given out or held back. A
            character that is not whole yet does not count.
        stop_string: What the text ended at, once it has.
    """

    __slots__ = (
        "_drops_space",
        "_held",
        "_include_stop",
        "_min_tokens",
        "_num_tokens",
        "_partial",
        "_pieces",
        "_stop",
        "num_characters",
        "stop_string",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt: Sequence[int] = (),
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        marks: frozenset[str] = frozenset(),
    ) -> None:
        self._pieces: Mapping[int, str | bytes] = tokenizer.pieces_showing(marks)
        self._drops_space = tokenizer.drops_first_space and not any(
            self._pieces[token] for token in prompt
        )
        self._partial: codecs.IncrementalDecoder | None = None
        self._stop = StopStrings(stop) if stop else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self.num_characters = 0
        self.stop_string: str | None = None

    def push(self, tokens: Sequence[int], finish: int = 0) -> TextDelta:
        """Add the next tokens; ``finish`` as in a ``TokenRow``.

        With ``FinishReason.STOP`` the last of ``tokens`` is the stop token.
        """
        if finish or self._stop is not None:
            return self._push_watchfully(tokens, finish)
        decode = self._decode
        text = decode(tokens[0]) if len(tokens) == 1 else "".join(map(decode, tokens))
        return TextDelta(text, len(tokens), is_stopped=False)

    def _push_watchfully(self, tokens: Sequence[int], finish: int) -> TextDelta:
        """The same where the text may end with one of the tokens."""
        num_text_tokens = len(tokens)
        if finish == FinishReason.STOP and not self._include_stop:
            num_text_tokens -= 1
        texts = []
        for index in range(num_text_tokens):
            text = self._decode(tokens[index])
            is_stopped = False
            if self._stop is not None:
                self._num_tokens += 1
                text, is_stopped = self._search(self._stop, text)
            texts.append(text)
            if is_stopped:
                return TextDelta("".join(texts), index + 1, is_stopped=True)
        is_stopped = False
        if finish:
            text, is_stopped = self._finish()
            texts.append(text)
        return TextDelta("".join(texts), len(tokens), is_stopped)

    def _decode(self, token: int) -> str:
        """The text that one more token makes whole."""
        piece = self._pieces[token]
        if self._partial is not None or type(piece) is bytes:
            piece = self._decode_partial(piece)
        assert isinstance(piece, str)
        if self._drops_space and piece:
            self._drops_space = False
            piece = piece.removeprefix(" ")
        self.num_characters += len(piece)
        return piece

    def _decode_partial(self, piece: str | bytes) -> str:
        """The same where characters are not whole.

        Bytes that never become a character are replaced by U+FFFD, once for each maximal part of
        one (Unicode Standard, section 3.9), which is also what decoding the whole text does.
        """
        if not piece:
            return ""
        if self._partial is None:
            self._partial = codecs.getincrementaldecoder("utf-8")("replace")
        text = self._partial.decode(piece if isinstance(piece, bytes) else piece.encode())
        if not self._partial.getstate()[0]:
            self._partial = None
        return text

    def _search(self, stop: StopStrings, text: str) -> Searched:
        """Hold back what may become a stop string; end where one is complete."""
        if self._num_tokens <= self._min_tokens:
            return Searched(text, is_stopped=False)
        window = self._held + text
        match = stop.find(window)
        if match is not None:
            self._held = ""
            self.stop_string = window[match.start : match.end]
            end = match.end if self._include_stop else match.start
            return Searched(window[:end], is_stopped=True)
        cut = len(window) - stop.held_length(window)
        self._held = window[cut:]
        return Searched(window[:cut], is_stopped=False)

    def _finish(self) -> Searched:
        """Give out what was held back: nothing can complete it any more."""
        text = "" if self._partial is None else self._partial.decode(b"", final=True)
        self._partial = None
        self.num_characters += len(text)
        if self._stop is None:
            return Searched(text, is_stopped=False)
        text, is_stopped = self._search(self._stop, text)
        held, self._held = self._held, ""
        return Searched(text + held, is_stopped)
