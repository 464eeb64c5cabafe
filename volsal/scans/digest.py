"""What a file holds, in 64 hexadecimal digits."""

from __future__ import annotations

import hashlib
from io import FileIO
from pathlib import Path

# hashlib's file_digest makes a buffer of this size anew for every file; those of a case are small, and many.
_BLOCK = 1 << 18


def sha256_of(*paths: Path) -> str:
    """SHA-256 of the bytes of one file, or of several one after the other, hexadecimal.

    Raises
    ------
    OSError
        Where one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            _absorb(digest, file)
    return digest.hexdigest()


def sha256_after(begun: bytes, file: FileIO) -> str:
    """SHA-256 of a file of which ``begun`` has been read, hexadecimal; errors as for :func:`sha256_of`."""
    digest = hashlib.sha256(begun)
    _absorb(digest, file)
    return digest.hexdigest()


def _absorb(digest: hashlib._Hash, file: FileIO) -> None:
    while block := file.read(_BLOCK):
        digest.update(block)
