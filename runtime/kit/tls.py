"""TLS for a listening socket, with a certificate that can change while it serves."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

from understudy.protocol.errors import ConfigurationError


class Certificate:
    """A certificate chain and its private key.

    ``context`` is what a server listens with. A new certificate counts for connections that come
    after it was read; those that are open go on.

    Raises:
        ConfigurationError: they cannot be read, or do not belong together.
    """

    def __init__(self, chain: Path, key: Path, complain: Callable[[str], None]) -> None:
        self._chain = chain
        self._key = key
        self._complain = complain
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._load(self.context)

    def reload(self) -> None:
        """Read the files again; what cannot be read changes nothing."""
        try:
            # A key that does not fit would spoil the context in use: it is tried elsewhere.
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(self.context)
        except ConfigurationError as error:
            self._complain(f"the certificate stays as it is: {error}")

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self._chain, self._key, password=_no_password)
        except (OSError, ValueError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            raise ConfigurationError(f"{self._chain}, {self._key}: {reason}") from error


def _no_password() -> bytes:
    raise ValueError("the key has a password: nobody is there to give it")
