"""Models from files, without running code that nobody named."""

from volsal.models.load import load_model, weights_digest

__all__ = ["load_model", "weights_digest"]
