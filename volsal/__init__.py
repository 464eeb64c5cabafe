"""Saliency for volumetric medical imaging models: where in the patient a 3D model found its evidence."""

__version__ = "0.1.0"
