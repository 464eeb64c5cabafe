"""The pixels of a DICOM series, decoded in a child process; see :mod:`volsal.scans.dicom_pixels` for the child."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from volsal.scans import dicom_pixels
from volsal.scans.dicom_frames import NATIVE, Frame, Refused, Source
from volsal.scans.dicom_pixels import IMPLICIT_LITTLE

# A compressed frame may be all black and tiny, so a ratio alone says nothing about small frames.
_COMPRESSED_ROOM, _COMPRESSED_RATIO = 64 << 20, 200
_BASE_MEMORY = 3 << 30  # address space, which an interpreter with its libraries takes generously
_BASE_SECONDS, _SECONDS_PER_FRAME, _BYTES_PER_SECOND = 60.0, 0.5, 4e6
_WITHOUT_DECODER = {
    # Under the GPL, so not among volsal's own requirements.
    "1.2.840.10008.1.2.4.51": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.57": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.70": "pylibjpeg-libjpeg",
}


def require_decodable(frames: Sequence[Frame]) -> None:
    """Raise :class:`Refused` where pixels are no values, cannot be decoded here, or cannot be all there."""
    for source in {frame.source.path: frame.source for frame in frames}.values():
        if source.samples != 1 or source.photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise Refused(
                f"{source.name}: colour pixels ({source.photometric}, {source.samples} samples per pixel), as in a "
                "secondary capture; volsal explains one real number per voxel"
            )
        if source.oddity:
            raise Refused(f"{source.name}: {source.oddity}")
        _require_syntax(source)
        _require_room(source)
    for frame in frames:
        if not math.isfinite(frame.slope * frame.intercept) or frame.slope == 0:
            raise Refused(f"{frame.label}: scaling by slope {frame.slope:g} leaves no value")


def _require_syntax(source: Source) -> None:
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    uid = UID(source.syntax)
    try:
        decoder = get_decoder(uid)
    except NotImplementedError:
        name = "private or unknown" if uid.is_private or uid.name == uid else uid.name
        raise Refused(
            f"{source.name}: transfer syntax {uid[:64]} ({name}) cannot be decoded; send the series again, uncompressed"
        ) from None
    if not decoder.is_available:
        wanted = _WITHOUT_DECODER.get(uid, '"volsal[dicom]"')
        raise Refused(f"{source.name}: no decoder for transfer syntax {uid} ({uid.name}); pip install {wanted}")


def _require_room(source: Source) -> None:
    """The header's promise against what the file holds, before anything is allocated for it."""
    if min(source.rows, source.columns) < 2 or source.frames < 1:
        raise Refused(f"{source.name}: {source.rows} x {source.columns} pixels; volsal explains volumes")
    needed = source.rows * source.columns * source.frames * source.bits // 8
    if source.syntax in NATIVE:
        left = max(0, source.held - (8 if source.syntax == IMPLICIT_LITTLE else 12))  # the element's own header
        if needed > left:
            raise Refused(
                f"{source.name}: its header promises {needed:,} bytes of pixels, and {left:,} are left in the file: "
                "cut short? Fetch it again"
            )
    elif needed > max(_COMPRESSED_ROOM * source.frames, _COMPRESSED_RATIO * source.held):
        raise Refused(
            f"{source.name}: its header promises {needed:,} bytes of pixels out of {source.held:,} compressed bytes, "
            "which is beyond belief; fetch it again"
        )


def decode(frames: Sequence[Frame]) -> NDArray[np.float32]:
    """Scaled values, (frames, rows, columns) float32: stored value * RescaleSlope + RescaleIntercept, in float64.

    Raises
    ------
    Refused
        Naming the file whose pixels cannot be decoded, also where the decoder died of them.
    """
    source = frames[0].source
    out = np.empty((len(frames), source.rows, source.columns), np.float32)
    seconds = _BASE_SECONDS + _SECONDS_PER_FRAME * len(frames) + out.nbytes / _BYTES_PER_SECOND
    largest = max(frame.source.held for frame in frames)
    job = {
        "frames": [[str(f.source.path.absolute()), f.index, f.slope, f.intercept] for f in frames],
        "rows": source.rows,
        "columns": source.columns,
        "memory": _BASE_MEMORY + 4 * largest + 64 * source.rows * source.columns,
        "seconds": int(seconds) + 1,
    }
    # One thread: the libraries' pools would take address space and give nothing here.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # -P: the working folder is not searched for modules, where anything may lie.
    command = [sys.executable, "-P", str(dicom_pixels.__file__)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as child:
        clock = threading.Timer(seconds, child.kill)
        clock.start()
        try:
            done, reason = _receive(child, job, out)
        finally:
            late = not clock.is_alive()
            clock.cancel()
            child.kill()
    if done < len(frames):
        death = f"took more than {seconds:.0f} s" if late else _death(child.returncode)
        raise Refused(f"{frames[done].label}: its pixels cannot be decoded ({reason or death}); fetch the series again")
    return out


def _receive(child: subprocess.Popen[bytes], job: dict[str, Any], out: NDArray[np.float32]) -> tuple[int, str]:
    """How many frames came, and the reason that the child gave for the next."""
    stdin, stdout = child.stdin, child.stdout
    assert stdin is not None
    assert stdout is not None
    try:
        stdin.write(json.dumps(job).encode())
        stdin.close()
    except OSError:
        return 0, "the decoder did not start"
    for done, frame in enumerate(out):
        kind = stdout.read(1)
        if kind == dicom_pixels.FAILED:
            return done, _printable(stdout)
        if kind != dicom_pixels.FRAME or stdout.readinto(memoryview(frame).cast("B")) < frame.nbytes:  # type: ignore[attr-defined]
            child.wait()
            return done, ""
    return len(out), ""


def _printable(stdout: IO[bytes]) -> str:
    text = stdout.read(1000).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the decoder died of {signal.Signals(-code).name}: damaged, or beyond its limit of memory or time"
    return f"the decoder stopped with status {code}"
