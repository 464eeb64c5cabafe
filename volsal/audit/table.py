"""Every metric of the audit: what it is, its range, what chance scores, and when there is no figure."""

from __future__ import annotations

from math import inf

from volsal.audit.anatomy import budget
from volsal.audit.faithfulness import (
    Curve,
    deletion,
    delta_areas,
    delta_aupc,
    faithfulness_correlation,
    infidelity,
    insertion,
    intervene,
)
from volsal.audit.localization import LOCALIZATION
from volsal.audit.metric import Metric
from volsal.audit.sanity import excess, label_randomisation, random_logit, randomisation
from volsal.audit.similarity import peak_distance_mm, spearman, ssim, top_dice
from volsal.audit.stability import stability

_MAP = "the map holds NaN, is empty or is constant"
_UNRELATED = "that of unrelated maps"

#: All metrics by name.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *LOCALIZATION.values(),
        Metric("deletion", "faithfulness", deletion, "area under the score while voxels go, most relevant first",
               "Petsiuk et al. 2018", -inf, inf, "lower", "random orders", "never"),
        Metric("insertion", "faithfulness", insertion, "area under the score while voxels come back",
               "Petsiuk et al. 2018", -inf, inf, "higher", "random orders", "never"),
        Metric("AOPC", "faithfulness", Curve, "mean loss of the score over the steps of a deletion",
               "Samek et al. 2017", -inf, inf, "higher", "random orders", "never"),
        Metric("delta AUPC", "faithfulness", delta_aupc, "area of deletions in orders of chance minus the map's",
               "Jin et al. 2022", -inf, inf, "higher", "0", _MAP),
        Metric("delta areas", "faithfulness", delta_areas,
               "delta AUPC of deletion, and area of the map's insertion minus that of insertions in orders of chance",
               "Petsiuk et al. 2018; Jin et al. 2022", -inf, inf, "higher", "0", _MAP),
        Metric("local intervention", "faithfulness", intervene,
               "loss of the score without small balls at the map's peaks, over that without balls elsewhere", "volsal",
               -inf, inf, "higher", "about 1", _MAP + ", or has no positive part; no room for controls; controls that "
               "do not move the score"),
        Metric("faithfulness correlation", "faithfulness", faithfulness_correlation,
               "correlation of sums of the map over random regions with the loss of the score without them",
               "Bhatt et al. 2020", -1, 1, "higher", "0", "the map or the score does not vary"),
        Metric("infidelity", "faithfulness", infidelity,
               "squared error of the map's prediction of what noise does, over that of an empty map",
               "Yeh et al. 2019", 0, inf, "lower", "1", "noise does not move the score; the map holds NaN"),
        Metric("weight randomisation", "sanity", randomisation, "similarity of the map to that of random weights",
               "Adebayo et al. 2018", -1, 1, "lower", _UNRELATED, _MAP),
        Metric("excess similarity", "sanity", excess,
               "mean similarity after randomisation minus that of unrelated maps; passed below 0", "Arun et al. 2021",
               -2, 2, "lower", "0", "no similarity is defined"),
        Metric("random logit", "sanity", random_logit, "similarity of the map to those for other outputs",
               "Sixt et al. 2020", -1, 1, "lower", _UNRELATED, _MAP + "; the model has one output"),
        Metric("label randomisation", "sanity", label_randomisation,
               "similarity of the map to that of a model trained on shuffled labels", "Adebayo et al. 2018", -1, 1,
               "lower", _UNRELATED, _MAP),
        Metric("stability", "stability", stability, "similarity of the map to that of a harmlessly changed scan",
               "Arun et al. 2021", -1, 1, "higher", _UNRELATED, _MAP + "; the model's answer changed"),
        Metric("max-sensitivity", "stability", stability, "largest relative change of the map under noise",
               "Yeh et al. 2019", 0, inf, "lower", "none: 0 for a map that ignores the scan",
               _MAP + "; voxels have moved; the model's answer changed"),
        Metric("local Lipschitz", "stability", stability, "largest change of the map over change of the input",
               "Alvarez-Melis and Jaakkola 2018", 0, inf, "lower", "none: 0 for a map that ignores the scan",
               _MAP + "; voxels have moved; the model's answer changed"),
        Metric("spearman", "similarity", spearman, "rank correlation of two maps", "Adebayo et al. 2018", -1, 1,
               "neither", "0", _MAP),
        Metric("SSIM", "similarity", ssim, "structural similarity of two maps", "Wang et al. 2004", -1, 1, "neither",
               _UNRELATED, "a map holds NaN"),
        Metric("top Dice", "similarity", top_dice, "overlap of the most relevant voxels of two maps", "Dice 1945", 0, 1,
               "neither", "their share of the volume", "a map has no positive part"),
        Metric("peak distance, mm", "similarity", peak_distance_mm, "between the maxima of two maps", "volsal", 0, inf,
               "neither", "distance of two random voxels", _MAP),
        Metric("evidence share", "anatomy", budget, "share of the relevance in a region", "volsal", 0, 1, "neither",
               "the region's share of the volume", _MAP),
        Metric("evidence density", "anatomy", budget, "share of the relevance over share of the volume", "volsal", 0,
               inf, "neither", "1", _MAP + "; the region has no voxel"),
    )
}  # fmt: skip
