"""Attribution: from a model, a volume and a target to a raw map.

``METHODS`` is the table of every method by the name that configs and the command line use.  A new method is a class in
its family's file and a line here.
"""

from volsal.attribution.alignment import ALIGNMENTS, Alignment, AlignmentError, AlignmentRule
from volsal.attribution.cam import GradCAM, HiResCAM
from volsal.attribution.gradient import InputGradient
from volsal.attribution.guided import GuidedBackprop, GuidedGradCAM
from volsal.attribution.layers import Layer, default_layer, list_layers
from volsal.attribution.method import Attribution, Context, Method, attribute
from volsal.attribution.rules import CoverageError
from volsal.attribution.tap import LayerError, ModelError
from volsal.attribution.targets import (
    ClassLogit,
    ClassMargin,
    PredictedClass,
    SingleOutput,
    Target,
    TargetError,
    parse_target,
    target_id,
)

METHODS: dict[str, type[Method]] = {
    method.id: method for method in (GradCAM, HiResCAM, GuidedBackprop, GuidedGradCAM, InputGradient)
}

__all__ = [
    "ALIGNMENTS",
    "METHODS",
    "Alignment",
    "AlignmentError",
    "AlignmentRule",
    "Attribution",
    "ClassLogit",
    "ClassMargin",
    "Context",
    "CoverageError",
    "GradCAM",
    "GuidedBackprop",
    "GuidedGradCAM",
    "HiResCAM",
    "InputGradient",
    "Layer",
    "LayerError",
    "Method",
    "ModelError",
    "PredictedClass",
    "SingleOutput",
    "Target",
    "TargetError",
    "attribute",
    "default_layer",
    "list_layers",
    "parse_target",
    "target_id",
]
