"""The three objects that a map becomes: Parametric Map (PS3.3 A.75), Segmentation (A.51), Secondary Capture (A.8.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volsal.dicom_out.source import Reference, Source, taking_over, without_remarks
from volsal.dicom_out.threshold import Threshold
from volsal.display import limits

# PS3.16: kinds of visual explanation.  Of a method that has no code of its own, a more general one is true.
_CLASS_ACTIVATION, _VISUAL_EXPLANATION = ("130402", "Class activation"), ("130401", "Visual explanation")
_EXPLANATIONS = {
    "grad-cam": ("130403", "Gradient-weighted class activation"),
    "input-gradient": ("130404", "Saliency"),
    "eigen-cam": _VISUAL_EXPLANATION,  # of no class
}
_MAP_SERIES, _REGION_SERIES, _PICTURE_SERIES = 9700, 9800, 9900
# DICOM's own lengths of a label and of a line (PS3.5, SH and LO).
_SHORT, _LINE = 16, 64


@dataclass(frozen=True, eq=False)
class Map:
    """What the objects are told of a map.

    Attributes
    ----------
    entry : its part of ``case.json``
    number : of the map in its case, from 1
    values : (slices, rows, columns) float32 of the source
    weights_sha256 : the model's
    version : volsal's when it was made
    made : when that was
    """

    entry: Mapping[str, Any]
    number: int
    values: NDArray[np.float32]
    weights_sha256: str
    version: str
    made: datetime

    @property
    def name(self) -> str:
        """Method and target, as in file names."""
        return f"{self.entry['name']} {self.entry['target']}"

    @property
    def layer(self) -> str:
        """Where it was taken, in words."""
        return f"layer {self.entry['layer']}" if self.entry["layer"] else "the model's input"


def parametric_map(source: Source, shown: Map) -> Any:
    """The map with its values as they are, float32, in its own unit."""
    import highdicom as hd

    entry = shown.entry
    low, high = limits(entry["window"], entry["signed"])
    smallest, largest = float(shown.values.min()), float(shown.values.max())
    mapping = hd.pm.RealWorldValueMapping(
        lut_label=line(entry["name"], _SHORT),
        lut_explanation=line(entry["unit"]),
        unit=_unit(entry["unit"]),
        value_range=(smallest, largest),
        slope=1.0,
        intercept=0.0,
        quantity_definition=_explanation(entry),
    )
    with taking_over(source.name):
        made = hd.pm.ParametricMap(
            source.stand_ins(),
            pixel_array=np.ascontiguousarray(shown.values),
            # A layer's cells are coarse; a map made on the input's own voxels may trace a face.
            contains_recognizable_visual_features=entry["layer"] is None and source.recognizable,
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[
                hd.VOILUTTransformation((low + high) / 2, high - low, voi_lut_function="LINEAR_EXACT")
            ],
            content_label="SALIENCY_MAP",
            content_description=line(f"{entry['target_text']}; {shown.layer}"),
            **_of_series(source, shown, "map", _MAP_SERIES),
        )
    made.update(source.body_part())
    return _finished(source, shown, made)


@dataclass(frozen=True)
class Region:
    """The voxels of a map from ``value`` on.

    Attributes
    ----------
    mask : (slices, rows, columns) bool, with at least one voxel
    value : in the map's unit
    ml : its volume
    """

    mask: NDArray[np.bool_]
    value: float
    ml: float

    @classmethod
    def of(cls, source: Source, shown: Map, threshold: Threshold) -> Region | None:
        """The region; None where no voxel is evidence for the target, or none reaches the threshold."""
        value = threshold.value(shown.values, source.grid)
        if value is None:
            return None
        mask = shown.values >= value
        voxel_ml = abs(float(np.linalg.det(source.grid.affine[:3, :3]))) / 1000
        return cls(mask, value, float(mask.sum() * voxel_ml))


def segmentation(source: Source, shown: Map, region: Region, threshold: Threshold) -> Any:
    """The region as one binary segment, which says by what threshold, and how many ml it has."""
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    entry = shown.entry
    at_least = f"{region.value:.4g} {entry['unit']}"
    algorithm = hd.AlgorithmIdentificationSequence(
        name=line(f"volsal {entry['name']}"),
        version=line(shown.version),
        family=codes.DCM.ArtificialIntelligence,
        parameters={
            "target": line(entry["target"]),
            "layer": line(entry["layer"] or "model input"),
            "threshold": line(f"{at_least} ({threshold})"),
            "weights_sha256": shown.weights_sha256[:_SHORT],
        },
    )
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label=line(f"{shown.name} >= {at_least}"),
        segmented_property_category=Code("309825002", "SCT", "Spatial and Relational Concept"),
        segmented_property_type=Code("111030", "DCM", "Image Region"),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )
    segment.SegmentDescription = (
        f"Evidence of a model for {entry['target_text']}, no finding: voxels of its {shown.name} map of at least "
        f"{at_least} ({threshold}); {region.ml:.3g} ml"
    ).replace("\\", "/")[:1024]
    with taking_over(source.name):
        made = hd.seg.Segmentation(
            source.stand_ins(),
            pixel_array=region.mask.astype(np.uint8),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            content_label="SALIENCY_REGION",
            content_description=line(f"{entry['name']} >= {at_least}"),
            **_of_series(source, shown, "region", _REGION_SERIES),
        )
    return _finished(source, shown, made)


def capture(source: Source, shown: Map, picture: NDArray[np.uint8]) -> Any:
    """A picture, (height, width, 3) RGB, in which no patient is named but by what is burnt into the scan."""
    import highdicom as hd
    from pydicom.uid import ExplicitVRLittleEndian

    reference = source.stand_ins()[0]
    with taking_over(source.name):
        made = hd.sc.SCImage.from_ref_dataset(
            reference,
            pixel_array=picture,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),
            transfer_syntax_uid=ExplicitVRLittleEndian,
            **_of_series(source, shown, "picture", _PICTURE_SERIES),
        )
        made.copy_patient_and_study_information(reference)
    made.update(source.body_part())
    made.ConversionType = "SYN"
    # Several planes in one picture: each carries its own letters.
    made.PatientOrientation = []
    made.BurnedInAnnotation = "YES" if source.annotated else "NO"
    made.RecognizableVisualFeatures = "YES" if source.recognizable else "NO"
    made.DerivationDescription = line(f"{shown.entry['target_text']}; {shown.layer}")
    return _finished(source, shown, made)


def line(text: str, most: int = _LINE) -> str:
    """``text`` as one line of at most ``most`` characters, without what separates values in DICOM."""
    plain = "".join(c if c.isprintable() else " " for c in text.replace("\\", "/"))
    plain = " ".join(plain.split())
    return plain if len(plain) <= most else plain[: most - 3].rstrip() + "..."


def _unit(unit: str) -> Any:
    """A unit as UCUM has it: one of dimension 1, annotated with the map's own words."""
    from pydicom.sr.coding import Code

    plain = "".join(c if "!" <= c <= "~" and c not in "{}" else "_" for c in unit)
    return Code(f"{{{plain}}}", "UCUM", line(unit)) if plain else Code("1", "UCUM", "no units")


def _explanation(entry: Mapping[str, Any]) -> Any:
    from pydicom.sr.coding import Code

    value, meaning = _EXPLANATIONS.get(entry["method"], _CLASS_ACTIVATION if entry["layer"] else _VISUAL_EXPLANATION)
    return Code(value, "DCM", meaning)


def _of_series(source: Source, shown: Map, kind: str, first: int) -> dict[str, Any]:
    """What every object says of its series and of what made it.

    Of one volume, model, kind and name there is one series.
    """
    return {
        "series_instance_uid": source.uid("series", kind, source.volume, shown.name, shown.weights_sha256),
        "series_number": first + shown.number,
        "sop_instance_uid": source.uid("instance", kind, source.volume, shown.name),
        "instance_number": 1,
        "manufacturer": "volsal",
        "manufacturer_model_name": "volsal",
        "software_versions": line(shown.version),
        # The software is the same for every model: what tells devices apart is what the model has learnt.
        "device_serial_number": line(shown.weights_sha256 or "unknown"),
        "series_description": line(f"{shown.name} {kind} (research use)"),
        "specific_character_set": "ISO_IR 192",
        "content_date": shown.made.date(),
        "content_time": shown.made.time(),
    }


def _finished(source: Source, shown: Map, made: Any) -> Any:
    """References to the true source, one time throughout, and a name that follows from the content."""
    made.InstanceCreationDate, made.InstanceCreationTime = made.ContentDate, made.ContentTime = _when(shown.made)
    if "DateOfSecondaryCapture" in made:
        made.DateOfSecondaryCapture, made.TimeOfSecondaryCapture = _when(shown.made)
    for equipment in made.get("ContributingEquipmentSequence", ()):
        equipment.ContributionDateTime = "".join(_when(shown.made))
    _refer(made, source)
    organization = source.uid("dimensions", made.SOPInstanceUID)
    for sequence in ("DimensionOrganizationSequence", "DimensionIndexSequence"):
        for item in made.get(sequence, ()):
            item.DimensionOrganizationUID = organization
    # The same result is the same instance, sent once or twice; with another threshold it is another.
    made.SOPInstanceUID = source.uid("instance", sha256(encoded(made)).hexdigest())
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    return made


def _when(made: datetime) -> tuple[str, str]:
    return made.strftime("%Y%m%d"), made.strftime("%H%M%S")


def _refer(made: Any, source: Source) -> None:
    """Name the source's slices: all of them at the top, and with each frame its own."""
    from pydicom.dataset import Dataset

    files = dict.fromkeys(Reference(one.sop_class, one.sop, None) for one in source.references)
    made.SourceImageSequence = [_item(file) for file in files]
    series = Dataset()
    series.SeriesInstanceUID = source.series
    series.ReferencedInstanceSequence = [_item(file) for file in files]
    made.ReferencedSeriesSequence = [series]
    for group in made.get("PerFrameFunctionalGroupsSequence", ()):
        for derived in group.DerivationImageSequence:
            for stand_in in derived.SourceImageSequence:
                number = int(stand_in.ReferencedSOPInstanceUID.removeprefix("2.25."))
                stand_in.update(_item(source.references[number - 1]))


def _item(reference: Reference) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = reference.sop_class, reference.sop
    if reference.frame is not None:
        item.ReferencedFrameNumber = reference.frame
    return item


def encoded(dataset: Any) -> bytes:
    """The bytes of a DICOM file."""
    out = BytesIO()
    with without_remarks():
        dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()
