"""DICOM files opened within bounds; and, run as a script, the child process that decodes a series' pixels.

A damaged compressed stream can abort the whole interpreter from within a C library, so pixels are decoded in a process
of its own, with a limit on time and memory.  The child is this very file, run by its path: nothing of volsal and
nothing of the working folder is imported there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

DEFLATED = "1.2.840.10008.1.2.1.99"
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
# An image rarely deflates below a thirtieth; one that is all black does, hence the room beside the ratio.
_INFLATE_RATIO, _INFLATE_ROOM = 32, 64 << 20
_MARK = b"DICM"
FRAME, FAILED = b"\0", b"\1"


class Unreadable(Exception):
    """A file that says it is DICOM and cannot be parsed, in words that hold none of its content."""


def looks_like_dicom(head: bytes) -> bool:
    """Whether a file's first 132 bytes are DICOM's: with its mark, or without but with a first element of group 8."""
    if head[128:132] == _MARK:
        return True
    if head[:2] not in (b"\x02\x00", b"\x08\x00") or len(head) < 16 or head[3] != 0:
        return False
    explicit = head[4:6] in (b"UL", b"CS", b"UI", b"DA", b"OB")
    return explicit or struct.unpack("<I", head[4:8])[0] <= 64


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence for pydicom, whose remarks on a header quote what stands in it."""
    logger = logging.getLogger("pydicom")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def open_dicom(path: str, tags: list[str] | None = None) -> tuple[Any, int]:
    """The dataset in a file, and how many bytes it holds from its pixels on.

    Parameters
    ----------
    path : a regular file; others must be kept from here, since a pipe would block
    tags : read only these, and stop before the pixels; None reads everything

    Raises
    ------
    Unreadable
        Where the file is no DICOM, or its deflated part unfolds beyond any sensible image.
    """
    with Path(path).open("rb") as raw:
        try:
            return _parse(_with_preamble(raw), tags)
        except Unreadable:
            raise
        except Exception as error:  # a parser meeting damage raises anything, RecursionError included
            raise Unreadable(f"the DICOM header cannot be read ({type(error).__name__})") from error


def _with_preamble(raw: BinaryIO) -> BinaryIO:
    head = raw.read(132)
    if not looks_like_dicom(head):
        raise Unreadable("not a DICOM file")
    raw.seek(0)
    return raw if head[128:] == _MARK else BytesIO(bytes(128) + _MARK + raw.read())


def _parse(stream: BinaryIO, tags: list[str] | None) -> tuple[Any, int]:
    from pydicom import dcmread
    from pydicom.dataset import FileMetaDataset
    from pydicom.filereader import read_dataset

    with quiet():
        stream.seek(132)
        meta = FileMetaDataset(read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2))
        if str(meta.get("TransferSyntaxUID", "")) != DEFLATED:
            stream.seek(0)
            dataset: Any = dcmread(stream, stop_before_pixels=tags is not None, specific_tags=tags)
            if "TransferSyntaxUID" not in dataset.file_meta:
                implicit = dataset.original_encoding[0]
                dataset.file_meta.TransferSyntaxUID = IMPLICIT_LITTLE if implicit else EXPLICIT_LITTLE
        else:
            stream = BytesIO(_inflated(stream.read()))
            stop = None if tags is None else (lambda tag, vr, length: tag.group >= 0x7FE0)
            numbers: list[Any] | None = None if tags is None else [_tag(name) for name in tags]
            dataset = read_dataset(stream, False, True, stop_when=stop, specific_tags=numbers)
            dataset.file_meta = meta
        here = stream.tell()
        return dataset, stream.seek(0, os.SEEK_END) - here


def _tag(name: str) -> Any:
    from pydicom.datadict import tag_for_keyword
    from pydicom.tag import Tag

    return Tag(cast(int, tag_for_keyword(name)))


def _inflated(body: bytes) -> bytes:
    most = _INFLATE_ROOM + _INFLATE_RATIO * len(body)
    unfold = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = unfold.decompress(body, most)
    except zlib.error as error:
        raise Unreadable("its deflated part is damaged") from error
    if unfold.unconsumed_tail:
        raise Unreadable(f"its deflated part of {len(body):,} bytes unfolds to a size beyond {most:,} bytes")
    if not unfold.eof:
        raise Unreadable("its deflated part is cut short")
    return content


def stored_values(dataset: Any, index: int) -> NDArray:
    """The stored values of frame ``index``, (rows, columns), as the file means them: unused bits off, sign on."""
    from pydicom.pixels import get_decoder

    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    frame = decoder.as_array(dataset, index=index, raw=True)[0]
    stored, allocated = int(dataset.get("BitsStored", 0)), int(dataset.BitsAllocated)
    if frame.dtype.kind == "f" or not 0 < stored < allocated:
        return frame
    # The unused high bits may hold anything; old scanners kept their overlays there.
    values = frame.astype(np.int64) & ((1 << stored) - 1)
    if int(dataset.PixelRepresentation):
        values -= (values >> (stored - 1)) << stored
    return values


def _decode(job: dict[str, Any], out: IO[bytes]) -> None:
    """Write every frame of the job, scaled, as float32; or why not."""
    shape, opened, dataset = (job["rows"], job["columns"]), None, None
    for path, index, slope, intercept in job["frames"]:
        try:
            if path != opened:
                dataset, opened = open_dicom(path)[0], path
            with quiet():
                values = stored_values(dataset, index).astype(np.float64) * slope + intercept
            if values.shape != shape:
                raise Unreadable(f"its pixels decode to shape {values.shape}, not the header's {shape}")
        except Exception as error:  # noqa: BLE001 - whatever a decoder raises is the answer for this frame
            first = (str(error).splitlines() or [""])[0][:160]
            text = first if isinstance(error, Unreadable) else f"{type(error).__name__}: {first.rstrip(':')}"
            out.write(FAILED + text.encode())
            return
        out.write(FRAME + values.astype(np.float32).tobytes())


def _limit(memory: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows; the parent's clock still counts
        return
    for which, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS refuses some limits
            resource.setrlimit(which, (most, most))


def main() -> None:
    """The child: a job as JSON on stdin, frames on stdout."""
    job = json.loads(sys.stdin.buffer.read())
    _limit(job["memory"], job["seconds"])
    # A decoder's own prints must not fall among the frames.
    with os.fdopen(os.dup(1), "wb") as out:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        _decode(job, out)


if __name__ == "__main__":
    main()
