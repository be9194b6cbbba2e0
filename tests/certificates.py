"""Certificates for tests: self-signed, made anew by the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


class CertificateFiles(NamedTuple):
    """Where a certificate lies."""

    chain: Path
    key: Path


def make_certificate(directory: Path) -> CertificateFiles:
    """A new certificate for 127.0.0.1, in the place of an earlier one."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl command to make a certificate with")
    files = CertificateFiles(directory / "chain.pem", directory / "key.pem")
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(files.key), "-out", str(files.chain)),
        ],
        check=True,
        capture_output=True,
    )
    return files
