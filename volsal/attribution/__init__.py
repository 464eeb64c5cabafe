"""Attribution: from a model, a volume and a target to a raw map.

``METHODS`` is the table of every method by the name that configs and the command line use.  A new method is a class in
its family's file and a line here.

What is where:

===================  ==============================================================================================
methods              ``method`` (what all share), ``cam*`` with ``heads``, ``gradient``, ``guided``, ``smooth``,
                     ``integrated`` and ``deep_lift`` with ``baselines``, ``perturbation`` with ``occlusion``,
                     ``rise`` and ``regions``; ``settings``
the score            ``targets``, ``segmentation_targets``, ``similarity``, ``output_parts``; ``target_forms`` (text)
inside the model     ``tap`` (run it, cut it, differentiate), ``structure``, ``layers``, ``tokens``, ``inputs``
the backward pass    ``rules``, ``rescale``, ``lean``; ``spellings``
a layer's cells      ``alignment``; ``tracing``, ``following``, ``places``, ``operators``
window by window     ``windows``, ``stitching``, ``windowed``
===================  ==============================================================================================
"""

from volsal.attribution.alignment import ALIGNMENTS, Alignment, AlignmentError, AlignmentRule
from volsal.attribution.baselines import BaselineError
from volsal.attribution.cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, RespondCAM, XGradCAM
from volsal.attribution.cam_eigen import EigenCAM, EigenGradCAM
from volsal.attribution.cam_forward import AblationCAM, ScoreCAM
from volsal.attribution.cam_fused import CAMS, FusedCAM
from volsal.attribution.cam_linear import LinearCAM
from volsal.attribution.deep_lift import DeepLIFT
from volsal.attribution.gradient import GradientTimesInput, InputGradient
from volsal.attribution.guided import Deconvnet, GuidedBackprop, GuidedGradCAM
from volsal.attribution.inputs import Given, InputsError
from volsal.attribution.integrated import ExpectedGradients, IntegratedGradients
from volsal.attribution.layers import Layer, default_layer, list_layers
from volsal.attribution.method import Attribution, Context, Method, attribute
from volsal.attribution.occlusion import Occlusion
from volsal.attribution.output_parts import Within
from volsal.attribution.regions import RegionAblation
from volsal.attribution.rise import RISE
from volsal.attribution.rules import CoverageError
from volsal.attribution.segmentation_targets import (
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
from volsal.attribution.settings import SettingError
from volsal.attribution.similarity import CosineSimilarity
from volsal.attribution.smooth import SmoothGrad, SmoothGradSquared, VarGrad
from volsal.attribution.tap import LayerError, ModelError
from volsal.attribution.target_forms import parse_target
from volsal.attribution.targets import (
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
from volsal.attribution.windowed import explain_windows
from volsal.attribution.windows import Windows

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
