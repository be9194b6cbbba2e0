"""Grammars that an answer must follow, compiled: which tokens may come next, by llguidance.

Knows one model's vocabulary and llguidance, no tensors and no requests. Who checks a client's
grammar (``grammar_checker``) and who follows it (``grammar_masks``) compile it here, within the
same limits, so that what passed the check compiles in an engine as well.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from understudy.runtime.model.config import ModelConfig
from understudy.runtime.tokenizer import Tokenizer

T = TypeVar("T")

LIMITS: Final = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=16_384,
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""What compiling and each step may cost: tens of milliseconds and tens of megabytes at the worst.

``verbose_errors`` would put the text made so far into error messages.
"""
_DIGITS: Final = bytes.maketrans(b"\0\1", b"01")
PROTOTYPES_MAX: Final = 32
PROTOTYPE_BYTES_MAX: Final = 512 << 10
"""Compiled grammars that are kept, and their texts' bytes: compiled, one takes up to 500 times as
much."""


class GrammarError(Exception):
    """A grammar cannot be read, or is too expensive, or nothing can follow what was said."""


class GrammarVocabulary(NamedTuple):
    """A model's tokens as llguidance knows them."""

    tokenizer: LLTokenizer
    width: int
    """Of the logits."""
    eos_token_ids: frozenset[int]
    known: int
    """A bit for each id that the tokenizer has: a grammar may name ids, and others are in no mask.
    """

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of an answer.

        Raises:
            GrammarError: it cannot be compiled within the limits.
        """
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=LIMITS)
        check(matcher)
        return matcher

    def mask(self, matcher: LLMatcher) -> bytes:
        """The tokens that may come next: a bit for each, the lowest of each byte first.

        Raises:
            GrammarError: none may, or they cannot be found within the limits.
        """
        mask = matcher.compute_bitmask()
        check(matcher)
        mask = (int.from_bytes(mask, "little") & self.known).to_bytes(len(mask), "little")
        if not mask.strip(b"\0"):
            raise GrammarError("no text can follow it")
        return mask


def load_vocabulary(directory: Path) -> GrammarVocabulary:
    """Read a model directory's vocabulary.

    Raises:
        ConfigurationError: this directory cannot be served.
        GrammarError: the model has no token that ends an answer.
    """
    config = ModelConfig.from_directory(directory)
    tokenizer = Tokenizer.from_directory(directory)
    eos_token_ids = {*config.eos_token_ids}
    if tokenizer.eos_token_id is not None:
        eos_token_ids.add(tokenizer.eos_token_id)
    return make_vocabulary(tokenizer, config.vocab_size, frozenset(eos_token_ids))


def make_vocabulary(
    tokenizer: Tokenizer, width: int, eos_token_ids: frozenset[int]
) -> GrammarVocabulary:
    """The vocabulary of a tokenizer under logits of a width.

    Raises:
        GrammarError: the model has no token that ends an answer.
    """
    known = frozenset(token for token in eos_token_ids if token < width)
    if not known:
        raise GrammarError("the model has no token that ends an answer")
    tokens = _Tokens(tokenizer, width, known)
    made = LLTokenizer(cast("Any", tokens), eos_token=sorted(known))  # it looks for names
    tokens.greedy = made.greedy_tokenize
    spelled = bytes(bool(spelling) for spelling in tokens.tokens)
    bits = int(spelled[::-1].translate(_DIGITS), 2)
    return GrammarVocabulary(made, width, known, bits)


def check(matcher: LLMatcher) -> None:
    """Nothing, if the matcher is in order.

    Raises:
        GrammarError: it is not, and never will be again.
    """
    if matcher.is_error():
        raise GrammarError(matcher.get_error().removesuffix("\n<non-verbose/>"))


class Grammars:
    """An engine's compiled grammars. Thread-safe: each is compiled once, by who comes first.

    Args:
        load: Gives the vocabulary, at the first grammar: most engines never see one.
    """

    def __init__(self, load: Callable[[], GrammarVocabulary]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._vocabulary: Future[GrammarVocabulary] | None = None
        self._prototypes: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    @property
    def vocabulary(self) -> GrammarVocabulary:
        """The model's, loaded by whoever asks first."""
        with self._lock:
            is_first = self._vocabulary is None
            if self._vocabulary is None:
                self._vocabulary = Future()
            future = self._vocabulary
        if is_first:
            _settle(future, self._load)
        return future.result()

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher of its own at the beginning of an answer.

        Raises:
            GrammarError: it cannot be compiled within the limits.
        """
        with self._lock:
            future = self._prototypes.get(grammar)
            is_first = future is None
            if future is None:
                future = self._prototypes[grammar] = Future()
                self._forget_oldest()
            self._prototypes.move_to_end(grammar)
        if is_first:
            _settle(future, lambda: self.vocabulary.compile(grammar))
        return future.result().deep_copy()

    def _forget_oldest(self) -> None:
        size = sum(map(len, self._prototypes))
        while len(self._prototypes) > PROTOTYPES_MAX or (
            size > PROTOTYPE_BYTES_MAX and len(self._prototypes) > 1
        ):
            grammar, _ = self._prototypes.popitem(last=False)
            size -= len(grammar)


class _Tokens:
    """What ``LLTokenizer`` reads of a tokenizer; the names are llguidance's."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, width: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        special_ids = tokenizer.special_ids | eos_token_ids
        self._special_ids = special_ids
        self.eos_token_id = min(eos_token_ids)
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.spell(token) for token in range(width)]
        self.special_token_ids = sorted(token for token in special_ids if token < width)
        self.greedy: Callable[[str], list[int]] = lambda _: []

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens in which the model would expect a text that a grammar leaves no choice in.

        They must spell just that. Where a tokenizer adds something, such as a first space, or
        finds a special token in it, the longest tokens that fit do as well.
        """
        if isinstance(text, bytes):
            text = text.decode()
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        is_plain = all(
            token < len(self.tokens) and token not in self._special_ids for token in token_ids
        )
        if is_plain and b"".join(self.tokens[token] for token in token_ids) == text.encode():
            return token_ids
        return self.greedy(text)


def _settle(future: Future[T], make: Callable[[], T]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:  # noqa: BLE001 - whoever waits for it has to hear of it
        future.set_exception(error)
