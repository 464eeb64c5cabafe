"""The table says of every metric what a report must."""

import pytest

from volsal.audit.localization import LOCALIZATION
from volsal.audit.similarity import MEASURES
from volsal.audit.table import METRICS


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_every_metric_is_defined(metric):
    assert metric.low < metric.high
    assert metric.better in ("higher", "lower", "neither")
    assert all(len(text) > 0 for text in (metric.definition, metric.source, metric.chance, metric.undefined))
    assert metric.function.__doc__
    assert METRICS[metric.name] is metric


def test_all_that_is_measured_stands_in_it():
    assert LOCALIZATION.items() <= METRICS.items()
    assert len([metric for metric in METRICS.values() if metric.family == "similarity"]) == len(MEASURES) - 1
