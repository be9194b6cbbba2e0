"""Text to token ids, and what each token id spells.

Reads ``tokenizer.json`` and ``tokenizer_config.json`` of a Hugging Face directory and encodes as
``transformers`` does. Decoding knows two manners of spelling, those of the families served: the
byte-level alphabet of GPT-2 (Llama 3, Qwen) and SentencePiece's with byte fallback (Llama 2).
In both, each token stands for a fixed piece of UTF-8, so a text can be taken apart and put
together again token by token; see ``runtime/detokenizer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from understudy.protocol.errors import ConfigurationError

FILE_BYTES_MAX: Final = 512 << 20
_NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")
_NAMED_TOKENS_MORE: Final = ("cls_token", "mask_token")
_SPACE_MARK: Final = "\u2581"
_COMPOSED_MAX: Final = 4
"""Characters that NFC makes one of, at most (an alpha with breathing, accent and iota)."""


class _TokenizerFile(msgspec.Struct):
    """What is read of ``tokenizer.json`` here; its vocabulary is left to the library."""

    decoder: dict[str, Any] | None = None
    normalizer: dict[str, Any] | None = None


class TokenizerSettings(msgspec.Struct):
    """What ``tokenizer_config.json`` adds to ``tokenizer.json``."""

    special_tokens: dict[str, str]
    """The named ones that exist, such as ``bos_token``: chat templates know them by these names."""
    added: list[AddedToken]
    chat_template: str | None


class TokenPair(NamedTuple):
    """Two texts as one prompt."""

    ids: list[int]
    second_at: int
    """Where the second begins; 0 if nothing tells."""


class TokenPieces(dict[int, str | bytes]):
    """What each token adds to a text: a string, or bytes that are no whole characters.

    Filled as tokens are met, since most of a large vocabulary never is. A special token adds
    nothing; neither does an id that no token has.
    """

    def __init__(self, spell: Callable[[int], bytes], special_ids: frozenset[int]) -> None:
        super().__init__()
        self._spell = spell
        self._special_ids = special_ids

    def __missing__(self, token_id: int) -> str | bytes:
        spelling = b"" if token_id in self._special_ids else self._spell(token_id)
        piece: str | bytes
        try:
            piece = spelling.decode()
        except UnicodeDecodeError:
            piece = spelling
        self[token_id] = piece
        return piece


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        special_tokens: The named special tokens that the model has, by their names.
        special_ids: Tokens that are never part of a text.
        bos_token_id: What begins a text, if the model has it.
        eos_token_id: What ends a text, if the model has it.
        pieces: What each token adds to a text.
        drops_first_space: A text's first space is not part of it (SentencePiece).
    """

    def __init__(
        self,
        backend: Backend,
        settings: TokenizerSettings,
        file: _TokenizerFile,
        *,
        spells: bool = True,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens: Mapping[str, str] = settings.special_tokens
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self._is_byte_level, self.drops_first_space = (
            _spelling(file.decoder) if spells else (False, False)
        )
        self._letters = _byte_alphabet() if self._is_byte_level else {}
        self.pieces = TokenPieces(self.spell, self.special_ids)
        self._pieces_showing: dict[frozenset[str], TokenPieces] = {frozenset(): self.pieces}
        self._characters_per_token_max = self._longest_reach(file.normalizer)

    @classmethod
    def from_directory(cls, path: Path, *, spells: bool = True) -> Tokenizer:
        """Read a model directory; ``spells`` is false for a model that makes no tokens.

        Raises:
            ConfigurationError: files are missing, or this is no tokenizer that can be served.
        """
        file_path = path / "tokenizer.json"
        raw = _read(file_path)
        settings = read_settings(path)
        try:
            file = msgspec.json.decode(raw, type=_TokenizerFile)
            backend = Backend.from_buffer(raw)
        except Exception as error:
            raise ConfigurationError(f"{file_path}: no tokenizer: {error}") from error
        _add_tokens(backend, settings)
        try:
            return cls(backend, settings, file, spells=spells)
        except ValueError as error:
            raise ConfigurationError(f"{file_path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Tokens that spell something, added ones included; logits may be wider."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Special tokens that are spelled out in it become those tokens."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_pair(self, first: str, second: str) -> TokenPair:
        """Token ids of two texts, put together as the model's own template has it."""
        encoding = self._backend.encode(first, second)
        kinds: list[int] = encoding.type_ids
        second_at = kinds.index(1) if 1 in kinds else 0
        return TokenPair(encoding.ids, second_at)

    @property
    def tells_pairs(self) -> bool:
        """Whether a pair's types, where there are any, say no more than where its second begins."""
        kinds: list[int] = self._backend.encode("a", "a").type_ids
        return kinds == sorted(kinds) and set(kinds) <= {0, 1}

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, without special tokens unless they are asked for."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary has it; empty if there is no such token."""
        return self._backend.id_to_token(token_id) or ""

    def fewest_tokens(self, text: str) -> int:
        """A lower bound on the tokens of a text, without encoding it; 0 if none is known.

        It lets a gateway refuse a prompt of a million characters at once.
        """
        reach = self._characters_per_token_max
        return -(-len(text) // reach) if reach else 0

    def spell(self, token_id: int) -> bytes:
        """The bytes that a token stands for, special or not; empty if there is no such token."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            letters = self._letters
            try:
                return bytes([letters[letter] for letter in token])
            except KeyError:
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token.encode()
        return token.replace(_SPACE_MARK, " ").encode()

    def special_marks(self, marks: Iterable[str]) -> dict[str, int]:
        """Those of the marks that are special tokens, and their ids."""
        ids = {mark: self._backend.token_to_id(mark) for mark in marks}
        return {mark: number for mark, number in ids.items() if number in self.special_ids}

    def pieces_showing(self, marks: frozenset[str]) -> TokenPieces:
        """What each token adds to a text in which these special tokens are spelled out."""
        pieces = self._pieces_showing.get(marks)
        if pieces is None:
            shown = self.special_marks(marks).values()
            pieces = TokenPieces(self.spell, self.special_ids - {*shown})
            self._pieces_showing[marks] = pieces
        return pieces

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _longest_reach(self, normalizer: dict[str, Any] | None) -> int:
        """How many characters of a text one token covers at most; 0 if there is no limit.

        There is none where whitespace around an added token belongs to it, or where a normaliser
        may drop characters.
        """
        kind = None if normalizer is None else normalizer.get("type")
        composed = {None: 1, "NFC": _COMPOSED_MAX}.get(kind)
        strips = any(token.lstrip or token.rstrip for token in self._added.values())
        if not self._is_byte_level or composed is None or strips:
            return 0
        return composed * max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)


def read_settings(path: Path) -> TokenizerSettings:
    """Read ``tokenizer_config.json``, which a directory need not have.

    Raises:
        ConfigurationError: it is there and malformed.
    """
    values: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file_path = path / name
        if not file_path.is_file():
            continue
        try:
            values |= msgspec.json.decode(_read(file_path), type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"{file_path}: no JSON object: {error}") from error
    try:
        return _settings(values)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{path / 'tokenizer_config.json'}: malformed: {error}") from error


def _settings(values: dict[str, Any]) -> TokenizerSettings:
    named = {
        name: _token_text(values[name])
        for name in (*_NAMED_TOKENS, *_NAMED_TOKENS_MORE)
        if values.get(name) is not None
    }
    added = [
        _added_token(entry)
        for _, entry in sorted(
            (values.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])
        )
    ]
    more = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    if isinstance(more, dict):
        more = list(more.values())
    added += [
        AddedToken(_token_text(entry), special=True, normalized=False)
        for entry in (*named.values(), *more)
    ]
    return TokenizerSettings(
        special_tokens=named,
        added=added,
        chat_template=_default_template(values.get("chat_template")),
    )


def _default_template(value: Any) -> str | None:
    """The one template, or the one named "default" of several."""
    if isinstance(value, list):
        templates = {entry["name"]: entry["template"] for entry in value}
        value = templates.get("default")
    if value is not None and not isinstance(value, str):
        raise TypeError("chat_template is neither a string nor a list of named ones")
    return value


def _token_text(entry: Any) -> str:
    text = entry["content"] if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise TypeError("a special token is not a string")
    return text


def _added_token(entry: dict[str, Any]) -> AddedToken:
    flags = {
        name: bool(entry[name])
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        if name in entry
    }
    return AddedToken(_token_text(entry), **flags)


def _add_tokens(backend: Backend, settings: TokenizerSettings) -> None:
    """Add what only ``tokenizer_config.json`` knows, in the way of ``transformers``."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = {token.content: token for token in settings.added if token.content not in known}
    if missing:
        backend.add_tokens(list(missing.values()))


def _spelling(decoder: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether tokens are spelled in bytes, and whether a text's first space is dropped."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    marks = {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == marks:
        if len(kinds) == 3:
            return False, False
        first_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if steps[3:] == [first_space]:
            return False, True
    raise ValueError(
        f"decoder {'/'.join(map(str, kinds)) or 'missing'} is not supported; supported: "
        "byte-level, and SentencePiece with byte fallback"
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes (Radford et al., 2019).

    Printable bytes stand for themselves, the others for the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigurationError(f"{path}: larger than {FILE_BYTES_MAX} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigurationError(f"{path.parent}: no {path.name}") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
