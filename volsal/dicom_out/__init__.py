"""Results as DICOM, for a PACS or any viewer that reads it: each map on the slices of the series it was made from.

A map becomes a Parametric Map with its own values and unit, the region above a threshold a Segmentation, and a picture
of three planes a Secondary Capture.  By default no identifier of the source goes into them.
"""

from volsal.dicom_out.export import KINDS, Exported, Settings, case_folders, export_case
from volsal.dicom_out.source import DicomOutError, Identifiers, require_highdicom
from volsal.dicom_out.threshold import Threshold

__all__ = [
    "KINDS",
    "DicomOutError",
    "Exported",
    "Identifiers",
    "Settings",
    "Threshold",
    "case_folders",
    "export_case",
    "require_highdicom",
]
