"""Saliency for volumetric medical imaging models: where in the patient a 3D model found its evidence.

>>> import volsal
>>> sorted(volsal.METHODS)
['grad-cam', 'guided-backprop', 'guided-grad-cam', 'hires-cam', 'input-gradient']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from volsal.attribution import (
        METHODS,
        ClassLogit,
        ClassMargin,
        GradCAM,
        GuidedBackprop,
        GuidedGradCAM,
        HiResCAM,
        InputGradient,
        PredictedClass,
        SingleOutput,
        list_layers,
    )
    from volsal.config import load_config
    from volsal.errors import VolsalError
    from volsal.explain import Explainer, Explanation, Heatmap
    from volsal.grid import Grid
    from volsal.models import load_model
    from volsal.resampling import resample
    from volsal.scans import Scan, read_case, read_scan

# The module that each public name is defined in.  Importing them on first use keeps `volsal --help` at a quarter of a
# second; torch alone takes two.
_HOMES = {
    "volsal.attribution": (
        "METHODS", "ClassLogit", "ClassMargin", "GradCAM", "GuidedBackprop", "GuidedGradCAM", "HiResCAM",
        "InputGradient", "PredictedClass", "SingleOutput", "list_layers",
    ),
    "volsal.config": ("load_config",),
    "volsal.errors": ("VolsalError",),
    "volsal.explain": ("Explainer", "Explanation", "Heatmap"),
    "volsal.grid": ("Grid",),
    "volsal.models": ("load_model",),
    "volsal.resampling": ("resample",),
    "volsal.scans": ("Scan", "read_case", "read_scan"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "ClassLogit",
    "ClassMargin",
    "Explainer",
    "Explanation",
    "GradCAM",
    "Grid",
    "GuidedBackprop",
    "GuidedGradCAM",
    "Heatmap",
    "HiResCAM",
    "InputGradient",
    "PredictedClass",
    "Scan",
    "SingleOutput",
    "VolsalError",
    "list_layers",
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
