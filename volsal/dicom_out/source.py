"""The DICOM series that a map lies on: its slices, and what of its headers goes into the objects made from it."""

from __future__ import annotations

import hmac
import importlib.util
import logging
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from volsal.errors import VolsalError
from volsal.grid import Grid, lps_to_ras
from volsal.scans.dicom import stack_of
from volsal.scans.dicom_pixels import Unreadable, open_dicom, quiet
from volsal.scans.dicom_stack import Stack
from volsal.scans.find import pseudonym

Identifiers = Literal["none", "source"]
# How far a slice of a map may lie from the source's own, mm.
ON_SLICE_MM = 0.1

# The Patient, Study and Clinical Trial modules (PS3.3 C.7.1, C.7.2): what files the objects with their patient.
_FILED_BY = (
    "PatientName", "PatientID", "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "TypeOfPatientID",
    "PatientBirthDate", "PatientBirthTime", "PatientSex", "OtherPatientIDsSequence", "PatientAge", "PatientSize",
    "PatientWeight", "PatientSpeciesDescription", "ResponsiblePerson", "PatientIdentityRemoved",
    "DeidentificationMethod", "DeidentificationMethodCodeSequence", "LongitudinalTemporalInformationModified",
    "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber",
    "IssuerOfAccessionNumberSequence", "StudyDescription", "AdmissionID",
    "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID",
    "ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID", "ClinicalTrialTimePointID",
    "ClinicalTrialTimePointDescription",
)  # fmt: skip
_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName",
    "StudyID", "AccessionNumber",
)  # fmt: skip
_TECHNICAL = (
    "FrameOfReferenceUID", "BodyPartExamined", "Laterality", "RecognizableVisualFeatures", "BurnedInAnnotation",
)  # fmt: skip
_REMOVED = "volsal: patient and study left out, UIDs and PatientID replaced"
# The class of the stand-ins; what is referred to is said by :meth:`Source.references`.
_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"


class DicomOutError(VolsalError, ValueError):
    """A result cannot become DICOM."""


def require_highdicom() -> None:
    """Raise :class:`DicomOutError` where the packages of the extra are missing."""
    if importlib.util.find_spec("highdicom") is None:
        raise DicomOutError('writing DICOM needs highdicom: pip install "volsal[dicom]"')


@contextmanager
def without_remarks() -> Iterator[None]:
    """Silence for what pydicom and highdicom say of a header, which quotes what stands in it."""
    logger = logging.getLogger("highdicom")
    before = logger.disabled
    logger.disabled = True
    try:
        with quiet():
            yield
    finally:
        logger.disabled = before


@contextmanager
def taking_over(name: str) -> Iterator[None]:
    """Whatever a header's values make of pydicom and highdicom, as one line that quotes none of them."""
    try:
        with without_remarks():
            yield
    except DicomOutError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, Unreadable) as error:
        raise DicomOutError(
            f"the header of {name} holds what no new object can take over ({type(error).__name__}); leave it out with "
            "--identifiers none, or mend the series"
        ) from error


@dataclass(frozen=True)
class Reference:
    """One slice of the source, as other objects name it: ``frame`` counts from 1, None in a file of a single frame."""

    sop_class: str
    sop: str
    frame: int | None


@dataclass(frozen=True, eq=False)
class Source:
    """A series in order, and the names that objects made from it go by.

    Attributes
    ----------
    stack : where its slices lie
    header : of its first slice, what is taken over at most
    identifiers : ``source``: patient, study and UIDs as they are; ``none``: nothing of the patient and study, and in
        place of UIDs and patient ID others, always the same for the same ones and ``salt``
    salt : random bytes of which all made-up names are derived
    """

    stack: Stack
    header: Any = field(repr=False)
    identifiers: Identifiers
    salt: bytes = field(repr=False)

    @classmethod
    def read(cls, path: Path, series: str | None, identifiers: Identifiers, salt: bytes) -> Source:
        """The series in the DICOM folder or file ``path``; ``series`` as in :func:`volsal.scans.read_scan`.

        Raises
        ------
        ScanError
            Where there is no such series, or it is no volume.
        DicomOutError
            Where its slices lie unevenly, so that a map lies between them.
        """
        stack = stack_of(path, series)
        if stack.at is not None:
            raise DicomOutError(
                f"{path}: its slices lie unevenly, so its maps lie on interpolated slices that no source slice answers "
                "to; use the NIfTI maps, or fetch the whole series"
            )
        first = stack.frames[0].source
        wanted = ("StudyInstanceUID", *(_FILED_BY if identifiers == "source" else ("PatientID",)))
        with taking_over(first.name):
            header, _ = open_dicom(str(first.path), [*_TECHNICAL, *wanted, "SpecificCharacterSet"])
            header.decode()
        return cls(stack, header, identifiers, salt)

    @property
    def name(self) -> str:
        """The file that speaks for all."""
        return self.stack.frames[0].source.name

    @property
    def grid(self) -> Grid:
        """(columns, rows, slices), RAS+ mm."""
        return self.stack.grid

    def uid(self, *parts: str) -> str:
        """A UID derived from ``parts``: 2.25 and a UUID (PS3.5 B.2), the same for the same parts and salt."""
        made = hmac.digest(self.salt, "\0".join(parts).encode("utf-8", "backslashreplace"), "sha256")
        return f"2.25.{uuid.UUID(bytes=made[:16], version=5).int}"

    def named(self, uid: str) -> str:
        """What ``uid`` of the source is called in what is written."""
        if self.identifiers == "none":
            return self.uid("instead of", uid)
        if not re.fullmatch(r"[0-9.]{1,64}", uid):
            raise DicomOutError(
                f"{self.name}: it, its series or its study has no UID, by which a PACS could file what refers to it; "
                "use --identifiers none"
            )
        return uid

    @cached_property
    def references(self) -> tuple[Reference, ...]:
        """Of every slice, in the stack's order."""
        classes: dict[Path, str] = {}
        found = []
        for frame in self.stack.frames:
            path = frame.source.path
            if path not in classes:
                with taking_over(frame.source.name):
                    classes[path] = str(open_dicom(str(path), ["SOPClassUID"])[0].SOPClassUID)
            number = frame.index + 1 if frame.source.frames > 1 else None
            found.append(Reference(classes[path], self.named(frame.source.sop), number))
        return tuple(found)

    @property
    def series(self) -> str:
        """The source series' UID, as it is called in what is written."""
        return self.named(self.stack.frames[0].source.series)

    @property
    def volume(self) -> str:
        """What tells it from every other volume, those in the same series too: echoes, time points, orientations."""
        first = self.references[0]
        return f"{self.series} {first.sop} {first.frame}"

    @property
    def recognizable(self) -> bool:
        """Whether pictures of the scan may show a face; only where its header denies it they do not."""
        return self.header.get("RecognizableVisualFeatures") != "NO"

    def positions(self) -> NDArray[np.float64]:
        """Of every slice's first pixel, (slices, 3) LPS mm."""
        first = np.zeros((self.grid.shape[2], 3))
        first[:, 2] = np.arange(len(first))
        return self.grid.world(first) * (-1.0, -1.0, 1.0)

    def orientation(self) -> NDArray[np.float64]:
        """ImageOrientationPatient, (6,): along a row, then along a column, LPS."""
        axes = lps_to_ras(self.grid.affine)[:3, :2] / self.grid.spacing[:2]
        return axes.T.ravel()

    @property
    def between(self) -> float:
        """mm from slice to slice, along their normal."""
        return float(abs(np.linalg.det(self.grid.affine[:3, :3])) / np.prod(self._pixel_mm))

    @property
    def _pixel_mm(self) -> tuple[float, float]:
        columns, rows, _ = (float(mm) for mm in self.grid.spacing)
        return rows, columns

    @property
    def tilt(self) -> float:
        """Degrees between the line through the slices and their normal: of a gantry."""
        return float(np.degrees(np.arccos(min(1.0, self.between / self.grid.spacing[2]))))

    @property
    def annotated(self) -> bool:
        """Whether, as its header says, somebody wrote into the pixels: of whom, nobody can tell."""
        return self.header.get("BurnedInAnnotation") == "YES"

    def stand_ins(self) -> list[Any]:
        """A dataset for every slice that says what this source lets out, and nothing else.

        The geometry is the stack's own: what headers say of thickness and spacing is not believed.
        """
        from pydicom.dataset import Dataset
        from pydicom.valuerep import format_number_as_ds

        common = self._filed_by()
        common.SOPClassUID = _CT_IMAGE
        common.SeriesInstanceUID = self.series
        common.FrameOfReferenceUID = self._frame_of_reference()
        common.PositionReferenceIndicator = ""
        common.Columns, common.Rows = self.grid.shape[:2]
        common.PixelSpacing = [format_number_as_ds(mm) for mm in self._pixel_mm]
        common.SliceThickness = format_number_as_ds(self.between)
        common.ImageOrientationPatient = [format_number_as_ds(float(x)) for x in self.orientation()]
        slices = []
        for number, position in enumerate(self.positions(), 1):
            one = Dataset()
            one.update(common)
            one.SOPInstanceUID = f"2.25.{number}"
            one.ImagePositionPatient = [format_number_as_ds(float(mm)) for mm in position]
            slices.append(one)
        return slices

    def _frame_of_reference(self) -> str:
        """Shared with the source and so with all that lies on it.  A source without one is given its own."""
        own = str(self.header.get("FrameOfReferenceUID") or "")
        return self.named(own) if own else self.uid("frame of reference", self.series)

    def _filed_by(self) -> Any:
        """The patient and the study that the objects belong to."""
        from pydicom.dataset import Dataset

        filed = Dataset()
        for keyword in _EMPTY:
            setattr(filed, keyword, "")
        study = str(self.header.get("StudyInstanceUID") or "")
        if self.identifiers == "source":
            for keyword in _FILED_BY:
                if keyword in self.header:
                    filed[keyword] = self.header[keyword]
        else:
            study = study or self.stack.frames[0].source.series
            patient = str(self.header.get("PatientID") or study)
            filed.PatientID = pseudonym(patient, self.salt)
            filed.PatientIdentityRemoved, filed.DeidentificationMethod = "YES", _REMOVED
        filed.StudyInstanceUID = self.named(study)
        return filed

    def body_part(self) -> Any:
        """A dataset of what was scanned, as the source says it."""
        from pydicom.dataset import Dataset

        said = Dataset()
        for keyword in ("BodyPartExamined", "Laterality"):
            if keyword in self.header:
                said[keyword] = self.header[keyword]
        if "BodyPartExamined" not in said and "Laterality" not in said:
            said.Laterality = ""  # it may be one of a pair, and which is not known
        return said

    def onto(self, values: NDArray, grid: Grid) -> NDArray:
        """``values`` (I, J, K) of a map on ``grid`` as (slices, rows, columns) of the source; a view.

        ``grid`` may be stored the other way round, as converters do: axes are flipped and permuted, and no value is
        changed.

        Raises
        ------
        DicomOutError
            Where no flip and permutation brings the voxels onto the source's.
        """
        turn = np.rint(self.grid.to(grid)[:3, :3])
        order = np.abs(turn).argmax(axis=0)
        signs = turn[order, range(3)]
        if sorted(order) != [0, 1, 2] or np.abs(turn).sum() != 3:
            raise DicomOutError(self._elsewhere(grid))
        to_map = np.zeros((4, 4))
        to_map[3, 3] = 1
        for new, (old, sign) in enumerate(zip(order, signs, strict=True)):
            to_map[old, new] = sign
            to_map[old, 3] = grid.shape[old] - 1 if sign < 0 else 0
        turned = Grid([grid.shape[axis] for axis in order], grid.affine @ to_map)
        if not turned.same_as(self.grid, ON_SLICE_MM):
            raise DicomOutError(self._elsewhere(grid))
        i, j, k = (slice(None, None, int(sign)) for sign in signs)
        return values.transpose(order)[i, j, k].transpose(2, 1, 0)

    def _elsewhere(self, grid: Grid) -> str:
        return (
            f"the maps lie on {grid!r}, the DICOM series on {self.grid!r}: not the same voxels; name the series that "
            "the scan was converted from, or explain the DICOM folder itself"
        )
