"""Attribution: from a model, a volume and a target to a raw map.

``METHODS`` is the table of every method by the name that configs and the command line use.  A new method is a class in
its family's file and a line here.

What is where:

=================  =================================================================================================
``method``         what all methods share; ``settings`` of them
``cams``           class activation maps: cells of a layer, weighted
``gradients``      gradients by the input: plain, by rules, averaged, along paths
``perturbation``   what the score loses when parts of the scan are changed
``targets``        the score that is explained, and how it is spelt in text
``tap``            run a model, cut it, differentiate; beside it ``structure``, ``layers``, ``tokens``, ``inputs``
``alignment``      where a layer's cells lie on the model's input
``windows``        a model applied window by window
=================  =================================================================================================
"""

from volsal.attribution.alignment.alignment import ALIGNMENTS, Alignment, AlignmentError, AlignmentRule
from volsal.attribution.cams.cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, RespondCAM, XGradCAM
from volsal.attribution.cams.eigen import EigenCAM, EigenGradCAM
from volsal.attribution.cams.forward import AblationCAM, ScoreCAM
from volsal.attribution.cams.fused import CAMS, FusedCAM
from volsal.attribution.cams.linear import LinearCAM
from volsal.attribution.gradients.baselines import BaselineError
from volsal.attribution.gradients.deep_lift import DeepLIFT
from volsal.attribution.gradients.gradient import GradientTimesInput, InputGradient
from volsal.attribution.gradients.guided import Deconvnet, GuidedBackprop, GuidedGradCAM
from volsal.attribution.gradients.integrated import ExpectedGradients, IntegratedGradients
from volsal.attribution.gradients.rules import CoverageError
from volsal.attribution.gradients.smooth import SmoothGrad, SmoothGradSquared, VarGrad
from volsal.attribution.inputs import Given, InputsError
from volsal.attribution.layers import Layer, default_layer, list_layers
from volsal.attribution.method import Attribution, Context, Method, attribute
from volsal.attribution.perturbation.occlusion import Occlusion
from volsal.attribution.perturbation.regions import RegionAblation
from volsal.attribution.perturbation.rise import RISE
from volsal.attribution.settings import SettingError
from volsal.attribution.tap import LayerError, ModelError
from volsal.attribution.targets.forms import parse_target
from volsal.attribution.targets.parts import Within
from volsal.attribution.targets.segmentation import (
    Component,
    ComponentAt,
    Labels,
    Mask,
    Position,
    Predicted,
    Region,
    Segment,
    Voxel,
)
from volsal.attribution.targets.similarity import CosineSimilarity
from volsal.attribution.targets.target import (
    ClassLogit,
    ClassMargin,
    Named,
    OneOutput,
    PredictedClass,
    SingleOutput,
    Target,
    TargetError,
    target_id,
)
from volsal.attribution.windows.windowed import explain_windows
from volsal.attribution.windows.windows import Windows

_ALL: tuple[type[Method], ...] = (
    *CAMS.values(), FusedCAM, GuidedBackprop, GuidedGradCAM, Deconvnet, InputGradient, GradientTimesInput,
    SmoothGrad, SmoothGradSquared, VarGrad, IntegratedGradients, ExpectedGradients, DeepLIFT, Occlusion, RISE,
    RegionAblation,
)  # fmt: skip

METHODS: dict[str, type[Method]] = {method.id: method for method in _ALL}

__all__ = [
    "ALIGNMENTS",
    "METHODS",
    "RISE",
    "AblationCAM",
    "Alignment",
    "AlignmentError",
    "AlignmentRule",
    "Attribution",
    "BaselineError",
    "ClassLogit",
    "ClassMargin",
    "Component",
    "ComponentAt",
    "Context",
    "CosineSimilarity",
    "CoverageError",
    "Deconvnet",
    "DeepLIFT",
    "EigenCAM",
    "EigenGradCAM",
    "ExpectedGradients",
    "FusedCAM",
    "Given",
    "GradCAM",
    "GradCAMPlusPlus",
    "GradientTimesInput",
    "GuidedBackprop",
    "GuidedGradCAM",
    "HiResCAM",
    "InputGradient",
    "InputsError",
    "IntegratedGradients",
    "Labels",
    "Layer",
    "LayerCAM",
    "LayerError",
    "LinearCAM",
    "Mask",
    "Method",
    "ModelError",
    "Named",
    "Occlusion",
    "OneOutput",
    "Position",
    "Predicted",
    "PredictedClass",
    "Region",
    "RegionAblation",
    "RespondCAM",
    "ScoreCAM",
    "Segment",
    "SettingError",
    "SingleOutput",
    "SmoothGrad",
    "SmoothGradSquared",
    "Target",
    "TargetError",
    "VarGrad",
    "Voxel",
    "Windows",
    "Within",
    "XGradCAM",
    "attribute",
    "default_layer",
    "explain_windows",
    "list_layers",
    "parse_target",
    "target_id",
]
