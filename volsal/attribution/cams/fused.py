"""Class activation maps of several layers, joined on the model's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from volsal.attribution.cams.cam import CAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, RespondCAM, XGradCAM
from volsal.attribution.cams.eigen import EigenCAM, EigenGradCAM
from volsal.attribution.cams.forward import AblationCAM, ScoreCAM
from volsal.attribution.cams.linear import LinearCAM
from volsal.attribution.method import Attribution, Context, Method, spatial
from volsal.attribution.settings import SettingError
from volsal.errors import nearest

CAMS: dict[str, type[CAM]] = {
    kind.id: kind
    for kind in (
        LinearCAM, GradCAM, HiResCAM, GradCAMPlusPlus, RespondCAM, XGradCAM, LayerCAM, EigenCAM, EigenGradCAM,
        ScoreCAM, AblationCAM,
    )
}  # fmt: skip


@dataclass(frozen=True)
class FusedCAM(Method):
    r"""One class activation map of several layers: deep ones know what, shallow ones know where.

    .. math:: L = \operatorname{mean}_l \, \frac{U_l(L_l)}{\max |L_l|} \quad \text{or} \quad \max_l

    U places a layer's map on the input's voxels, by linear interpolation, its cells where the alignment rule puts them.
    Each map is first divided by its own largest magnitude: in its own unit a layer's values fall with the number of its
    cells, and shallow layers would not be heard.  So the result tells of places, and no longer how much evidence there
    is; a layer without any adds 0.  Maps (B, 1, *spatial) of the input's shape, in [-1, 1], or [0, 1] where the CAM
    has a ReLU.  Jiang et al. (LayerCAM, IEEE TIP 2021) join layers by the maximum.

    Parameters
    ----------
    cam : id of the class activation map
    layers : dotted names; none: the one layer that the CAM takes by itself
    how : "mean", or "max": at each voxel the layer that says most for the score
    """

    cam: str = "layer-cam"
    layers: Sequence[str] = ()
    how: Literal["mean", "max"] = "mean"

    id: ClassVar[str] = "fused-cam"
    unit: ClassVar[str] = "share of each layer's own maximum"

    @property
    def signed(self) -> bool:  # type: ignore[override]
        """As the CAM has it."""
        return CAMS[self.cam].signed

    def __post_init__(self) -> None:
        if self.cam not in CAMS:
            raise SettingError(f"{self.id}: {self.cam!r} is no class activation map{nearest(str(self.cam), CAMS)}")
        if self.how not in ("mean", "max"):
            raise SettingError(f"{self.id}: how is mean or max, not {self.how!r}")
        listed = isinstance(self.layers, Sequence) and not isinstance(self.layers, str)
        if not listed or not all(isinstance(name, str) for name in self.layers):
            raise SettingError(f"{self.id}: layers is a list of names, as in [layer2, layer3]; got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(self.layers))  # a list, as YAML has it, has no hash

    def ingredients(self) -> tuple[Method, ...]:
        """The CAM at each layer."""
        return tuple(CAMS[self.cam](layer) for layer in self.layers or (None,))

    def compose(self, volume: Tensor, answers: Sequence[Attribution], context: Context) -> Attribution:
        """The maps of each target on the input's voxels, joined; errors of the CAM."""
        size = tuple(volume.shape[2:])
        maps, facts = [], []
        for number in range(len(answers[0].maps)):
            placed = [one.alignments[number].place(_to_own_scale(one.maps[number]), size) for one in answers]
            layers = torch.stack(placed)
            maps.append(layers.mean(0) if self.how == "mean" else layers.amax(0))
            facts.append({"layers": {str(one.layer): one.alignments[number].describe() for one in answers}})
        notes = list(dict.fromkeys(note for one in answers for note in one.notes))
        if len(answers) == 1:
            notes.append("only one layer, so nothing was joined; name several with layers")
        return Attribution(maps, answers[0].scores, answers[0].output, facts=facts, notes=notes)


def _to_own_scale(values: Tensor) -> Tensor:
    """Each volume's map over its largest magnitude."""
    top = values.abs().amax((1, *spatial(values)), keepdim=True)
    return values / top.masked_fill(top == 0, 1)
