"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="YAML file that names the model and its preprocessing; see configs/.")
]
ConfigArgument = Annotated[
    Path, typer.Argument(help="YAML file that names the model and its preprocessing; see configs/.")
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option("--method", "-m", help="A method, e.g. grad-cam; repeat for several. Replaces the config's."),
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        help="What to explain: predicted-class, class-1, margin-1-0, regression, output-2, or a class name from the "
        "config; of a segmentation segment-1, segment-1-largest, segment-1-mm-12,-30,7, segment-1-in:MASK.nii.gz; of a "
        "part of the output logits/class-1. Repeat for several. Replaces the config's.",
    ),
]
VolumeOption = Annotated[
    str | None,
    typer.Option(help="Which volume of a 4D file, counted from 0; all: its volumes are the model's channels."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict-geometry", help="Refuse a file whose two geometries lie more than 0.1 mm apart.")
]
NanOption = Annotated[
    float | None, typer.Option("--nan", help="What NaN voxels become, e.g. -1024; files that hold some are refused.")
]
SeriesOption = Annotated[
    str | None,
    typer.Option(
        help="Which series of a DICOM folder: its number or UID in `volsal series`, or a part of its description."
    ),
]
SlicesOption = Annotated[
    Literal["resample"] | None,
    typer.Option(help="resample: accept DICOM slices at uneven distances, and interpolate between them."),
]
RegridOption = Annotated[
    bool, typer.Option("--regrid", help="Bring channels to the first one's voxels where they lie elsewhere.")
]
AlignmentOption = Annotated[
    Literal["auto", "half-pixel", "nominal", "measured", "flip-average"] | None,
    typer.Option(
        help="Where a layer's cells lie on the model's input: by custom, by the architecture, or as measured. "
        "auto is measured, or half-pixel with a note where that fails. Replaces the config's."
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-bundle",
        help="Let the config's MONAI bundle run its own code. Without it, a bundle that would is refused with what "
        "that is; with it, that is printed and recorded.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
FormOption = Annotated[
    Literal["sform", "qform"] | None,
    typer.Option(help="sform or qform: which of a file's two geometries, where they disagree."),
]
