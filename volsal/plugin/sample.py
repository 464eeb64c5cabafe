"""Sample data: a head of the demonstration with a lesion at a known place, and what its network says of it."""

from __future__ import annotations

from volsal.viewer.layers import LayerData
from volsal.viewer.opening import Opened, ShownMap

_METHODS = ("grad-cam", "input-gradient")


def explained_head() -> list[LayerData]:
    """The scan, with an unsigned and a signed map over it; a few seconds."""
    from volsal.demo.cohort import demo_cases
    from volsal.demo.net import CLASSES, PREPROCESS, load
    from volsal.explain import Explainer
    from volsal.plugin.files import turn_upright
    from volsal.preprocess import MonaiSteps

    case = demo_cases()[0]
    found = Explainer(load(), MonaiSteps.from_config(PREPROCESS), _METHODS, "lesion", CLASSES)(case.scan, case.name)
    maps = tuple(ShownMap(one.name, one.values, one.window, one.unit, one.signed) for one in found.maps)
    turn_upright()
    return Opened(case.scan, maps=maps).layers()
