"""The parts of an audit, under which headings of reporting guidelines each belongs, and what no audit can tell.

CLAIM: Mongan, Moy and Kahn, Radiology: AI 2020, and its 2024 update; TRIPOD+AI: Collins et al., BMJ 2024; FUTURE-AI:
Lekadir et al., BMJ 2025.  An audit is material for these headings; it does not fulfil a guideline.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """A part of an audit.

    Attributes
    ----------
    id, title : of the part
    headings : by guideline
    """

    id: str
    title: str
    headings: dict[str, str]


TRUST, PLACE, SHORTCUTS, GROUPS = "trust", "place", "shortcuts", "groups"

PARTS = (
    Part(TRUST, "Can the maps be believed?", {
        "CLAIM": "Methods, Evaluation: methods for explainability or interpretability and how they were validated; "
                 "robustness or sensitivity analysis",
        "TRIPOD+AI": "Methods, Analytical methods",
        "FUTURE-AI": "Explainability: evaluate explainability",
    }),
    Part(PLACE, "Does the evidence lie where it should?", {
        "CLAIM": "Methods, Evaluation: methods for explainability or interpretability and how they were validated",
        "TRIPOD+AI": "Discussion, Interpretation",
        "FUTURE-AI": "Explainability: evaluate explainability",
    }),
    Part(SHORTCUTS, "Does the model answer by what it should not?", {
        "CLAIM": "Results, Model performance: failure analysis; Discussion: limitations, including potential bias",
        "TRIPOD+AI": "Discussion, Limitations",
        "FUTURE-AI": "Robustness: evaluate robustness; Fairness: sources of bias",
    }),
    Part(GROUPS, "Does it differ between groups of patients?", {
        "CLAIM": "Methods, Evaluation: statistical measures of significance and uncertainty",
        "TRIPOD+AI": "Methods, Fairness; Results, Model performance: heterogeneity",
        "FUTURE-AI": "Fairness: evaluate fairness; Universality",
    }),
)  # fmt: skip

LIMITS = (
    "The figures are of these scans, this model and this target. Other scanners, patients and weights have others.",
    "What is removed from a scan is filled with a blurred copy, which no scanner makes. A score that moves there more "
    "than elsewhere shows that the model uses the place, not that a radiologist would.",
    "A cue that is spread out, or doubled, is not seen by taking out small balls; nor is one inside the body told from "
    "a finding without masks.",
    "That nothing was flagged means that nothing was found by the rules stated, and not that there is nothing.",
    "A map that is trusted says where the model looks. It does not say why, nor that the answer is right.",
)


def described() -> list[dict[str, Any]]:
    """The parts as plain data."""
    return [asdict(part) for part in PARTS]
