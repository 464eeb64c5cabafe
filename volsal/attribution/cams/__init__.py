"""Class activation maps: cells of a layer, weighted by gradients (``cam``), a head or whole passes."""
