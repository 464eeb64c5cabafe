"""DICOM series with a patient, of one closed form: a soft ball at ``BALL_MM`` on a slope.

A slice has a multiple of eight pixels: of binary segmentations with another number SimpleITK 2.5 reads the last byte
from wherever its memory ends.
"""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

from volsal.grid import Grid

LPS = np.array([-1.0, -1.0, 1.0])
BALL_MM = np.array([9.0, 6.0, -4.0])  # RAS: to the patient's right
SECRETS = {
    "PatientName": "Zzphi^Älice",
    "PatientID": "Zzphi-4711",
    "PatientBirthDate": "19510203",
    "PatientSex": "F",
    "AccessionNumber": "Zzacc-99",
    "StudyID": "Zzst-1",
    "StudyDate": "20190304",
    "StudyTime": "101112",
    "ReferringPhysicianName": "Zzdoc^House",
    "StudyDescription": "Zzdesc brain",
    "InstitutionName": "Zzclinic",
    "SeriesDescription": "Zzseries",
    "OperatorsName": "Zzop",
}
AXIAL = ((1, 0, 0), (0, 1, 0))


def oblique(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    return turn[:, 0], turn[:, 1]


class Series:
    """Slices in memory.  ``step`` (LPS mm) leads from one to the next as numbered; the ball's centre is inside."""

    def __init__(
        self, axes=AXIAL, step=None, rows=24, columns=26, slices=12, spacing=(2.0, 1.5), thickness=3.0, **tags
    ):
        self.row, self.column = (np.array(axis, float) for axis in axes)
        self.step = np.cross(self.row, self.column) * thickness if step is None else np.array(step, float)
        self.shape, self.spacing, self.tags = (columns, rows, slices), spacing, tags
        middle = (
            self.row * spacing[1] * (columns - 1) + self.column * spacing[0] * (rows - 1) + self.step * (slices - 1)
        ) / 2
        self.positions = [self.step * k - middle for k in range(slices)]
        self.uid, self.study, self.frame = generate_uid(), generate_uid(), generate_uid()
        self.sops = [generate_uid() for _ in range(slices)]

    @property
    def grid(self):
        """(columns, rows, slices) with the slices as numbered."""
        affine = np.eye(4)
        across, down = self.row * self.spacing[1], self.column * self.spacing[0]
        affine[:3] = np.stack([across, down, self.step, self.positions[0]], axis=1) * LPS[:, None]
        return Grid(self.shape, affine)

    def values(self):
        """(columns, rows, slices) whole numbers."""
        at = self.grid.world(np.stack(np.meshgrid(*map(np.arange, self.shape), indexing="ij"), axis=-1))
        far = np.linalg.norm(at - BALL_MM, axis=-1)
        return np.rint(300 + 5 * at[..., 1] + 2 * at[..., 0] + 400 * np.exp(-((far / 9) ** 2))).astype(np.int16)

    def _common(self, sop, kind):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = kind, sop
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.SOPClassUID, dataset.SOPInstanceUID = kind, sop
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = self.uid, self.study
        dataset.FrameOfReferenceUID = self.frame
        dataset.Modality, dataset.SeriesNumber = "MR", 3
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
        dataset.BodyPartExamined = "HEAD"
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Columns, dataset.Rows = self.shape[:2]
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 1
        for keyword, value in {**SECRETS, **self.tags}.items():
            if value is not None:
                setattr(dataset, keyword, value)
            elif keyword in dataset:
                delattr(dataset, keyword)
        return dataset

    def write(self, folder):
        """A file for each slice, named by no order of theirs."""
        folder.mkdir(parents=True, exist_ok=True)
        values = self.values()
        for k, position in enumerate(self.positions):
            dataset = self._common(self.sops[k], CTImageStorage)
            dataset.InstanceNumber = 100 - k
            dataset.SliceThickness, dataset.SpacingBetweenSlices = 9, -20  # lies
            dataset.ImagePositionPatient = [f"{mm:.9g}" for mm in position]
            dataset.ImageOrientationPatient = [f"{x:.9g}" for x in (*self.row, *self.column)]
            dataset.PixelSpacing = list(self.spacing)
            dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
            dataset.PixelData = np.ascontiguousarray(values[..., k].T).tobytes()
            dataset["PixelData"].VR = "OW"
            dataset.save_as(folder / f"IM{(k * 5 + 3) % 97:03d}.dcm", enforce_file_format=True)
        return folder

    def write_enhanced(self, folder):
        """One file of all slices, with frames in an order of their own."""
        folder.mkdir(parents=True, exist_ok=True)
        dataset = self._common(self.sops[0], EnhancedMRImageStorage)
        order = self.frame_order()
        dataset.NumberOfFrames = len(order)
        shared, measures, plane = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = list(self.spacing), 9
        plane.ImageOrientationPatient = [f"{x:.9g}" for x in (*self.row, *self.column)]
        shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
        dataset.SharedFunctionalGroupsSequence = [shared]
        frames = []
        for k in order:
            own, place = Dataset(), Dataset()
            place.ImagePositionPatient = [f"{mm:.9g}" for mm in self.positions[k]]
            own.PlanePositionSequence = [place]
            frames.append(own)
        dataset.PerFrameFunctionalGroupsSequence = frames
        dataset.PixelData = np.ascontiguousarray(self.values()[..., order].transpose(2, 1, 0)).tobytes()
        dataset["PixelData"].VR = "OW"
        dataset.save_as(folder / "enhanced.dcm", enforce_file_format=True)
        return folder

    def frame_order(self):
        """Which slice each frame of the enhanced file holds."""
        return [(k * 5 + 3) % self.shape[2] for k in range(self.shape[2])]
