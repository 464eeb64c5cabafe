"""Models from files, without running code that nobody named."""

from volsal.models.bundle import Bundle, BundleError, load_bundle
from volsal.models.load import load_model, weights_digest

__all__ = ["Bundle", "BundleError", "load_bundle", "load_model", "weights_digest"]
