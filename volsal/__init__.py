"""Saliency for volumetric medical imaging models: where in the patient a 3D model found its evidence.

>>> import volsal
>>> {"grad-cam", "guided-backprop", "occlusion"} <= volsal.METHODS.keys()
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from volsal.attribution import (
        METHODS,
        RISE,
        AblationCAM,
        ClassLogit,
        ClassMargin,
        Component,
        ComponentAt,
        CosineSimilarity,
        Deconvnet,
        DeepLIFT,
        EigenCAM,
        EigenGradCAM,
        ExpectedGradients,
        FusedCAM,
        Given,
        GradCAM,
        GradCAMPlusPlus,
        GradientTimesInput,
        GuidedBackprop,
        GuidedGradCAM,
        HiResCAM,
        InputGradient,
        IntegratedGradients,
        Labels,
        LayerCAM,
        LinearCAM,
        Mask,
        Named,
        Occlusion,
        OneOutput,
        Position,
        PredictedClass,
        Region,
        RegionAblation,
        RespondCAM,
        ScoreCAM,
        Segment,
        SingleOutput,
        SmoothGrad,
        SmoothGradSquared,
        VarGrad,
        Voxel,
        Windows,
        Within,
        XGradCAM,
        explain_windows,
        list_layers,
    )
    from volsal.config import load_config
    from volsal.errors import VolsalError
    from volsal.explain import Explainer
    from volsal.explanation import Explanation, Heatmap
    from volsal.grid import Grid
    from volsal.models import load_bundle, load_model
    from volsal.resampling import resample
    from volsal.scans import Scan, read_case, read_scan

# The module that each public name is defined in.  Importing them on first use keeps `volsal --help` at a quarter of a
# second; torch alone takes two.
_HOMES = {
    "volsal.attribution": (
        "METHODS", "RISE", "AblationCAM", "ClassLogit", "ClassMargin", "Component", "ComponentAt", "CosineSimilarity",
        "Deconvnet", "DeepLIFT", "EigenCAM", "EigenGradCAM", "ExpectedGradients", "FusedCAM", "Given", "GradCAM",
        "GradCAMPlusPlus", "GradientTimesInput", "GuidedBackprop", "GuidedGradCAM", "HiResCAM", "InputGradient",
        "IntegratedGradients", "Labels", "LayerCAM", "LinearCAM", "Mask", "Named", "Occlusion", "OneOutput", "Position",
        "PredictedClass", "Region", "RegionAblation", "RespondCAM", "ScoreCAM", "Segment", "SingleOutput", "SmoothGrad",
        "SmoothGradSquared", "VarGrad", "Voxel", "Windows", "Within", "XGradCAM",
        "explain_windows", "list_layers",
    ),
    "volsal.config": ("load_config",),
    "volsal.errors": ("VolsalError",),
    "volsal.explain": ("Explainer",),
    "volsal.explanation": ("Explanation", "Heatmap"),
    "volsal.grid": ("Grid",),
    "volsal.models": ("load_bundle", "load_model"),
    "volsal.resampling": ("resample",),
    "volsal.scans": ("Scan", "read_case", "read_scan"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "RISE",
    "AblationCAM",
    "ClassLogit",
    "ClassMargin",
    "Component",
    "ComponentAt",
    "CosineSimilarity",
    "Deconvnet",
    "DeepLIFT",
    "EigenCAM",
    "EigenGradCAM",
    "ExpectedGradients",
    "Explainer",
    "Explanation",
    "FusedCAM",
    "Given",
    "GradCAM",
    "GradCAMPlusPlus",
    "GradientTimesInput",
    "Grid",
    "GuidedBackprop",
    "GuidedGradCAM",
    "Heatmap",
    "HiResCAM",
    "InputGradient",
    "IntegratedGradients",
    "Labels",
    "LayerCAM",
    "LinearCAM",
    "Mask",
    "Named",
    "Occlusion",
    "OneOutput",
    "Position",
    "PredictedClass",
    "Region",
    "RegionAblation",
    "RespondCAM",
    "Scan",
    "ScoreCAM",
    "Segment",
    "SingleOutput",
    "SmoothGrad",
    "SmoothGradSquared",
    "VarGrad",
    "VolsalError",
    "Voxel",
    "Windows",
    "Within",
    "XGradCAM",
    "explain_windows",
    "list_layers",
    "load_bundle",
    "load_config",
    "load_model",
    "read_case",
    "read_scan",
    "resample",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'volsal' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
