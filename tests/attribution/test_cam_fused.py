import pytest
import torch
from nets import random_net
from torch.testing import assert_close

from volsal import ClassLogit, FusedCAM, GradCAM, HiResCAM, LayerCAM
from volsal.attribution import CAMS, LayerError, attribute
from volsal.attribution.alignment.alignment import Nominal
from volsal.attribution.method import Context
from volsal.attribution.settings import SettingError


@pytest.mark.parametrize("rule", [None, Nominal()])
@pytest.mark.parametrize(("how", "join"), [("mean", lambda x: x.mean(0)), ("max", lambda x: x.amax(0))])
@pytest.mark.parametrize("kind", [LayerCAM, HiResCAM])
def test_is_the_mean_or_maximum_of_maps_to_their_own_scale_on_the_inputs_voxels(kind, how, join, rule, volume):
    net, context = random_net(), Context(rule) if rule else Context()
    placed = []
    for layer in ("1", "4"):
        alone = kind(layer).attribute(net, volume, [ClassLogit(1)], context)
        for_each = [values / values.abs().max() for values in alone.maps[0]]
        placed.append(alone.alignments[0].place(torch.stack(for_each), volume.shape[2:]))
    fused = FusedCAM(kind.id, ["1", "4"], how)
    answer = fused.attribute(net, volume, [ClassLogit(1)], context)
    assert_close(answer.maps[0], join(torch.stack(placed)))
    assert answer.layer is None
    assert fused.signed == kind.signed
    lies = answer.facts[0]["layers"]
    assert set(lies) == {"1", "4"}
    assert lies["4"]["kind"] == (rule.id if rule else "half-pixel")


def test_its_layers_share_one_pass_with_each_other_and_with_other_maps(volume):
    net, runs = random_net(), []
    net[0].register_forward_hook(lambda *_: runs.append(1))
    attribute(net, volume, [FusedCAM("grad-cam", ("1", "4")), GradCAM("4"), HiResCAM("2")], [ClassLogit(0)])
    assert len(runs) == 1


def test_a_layer_without_evidence_adds_nothing(volume):
    net = random_net()
    net[-1].weight.data[0] = -net[-1].weight.data[0].abs()  # layer "4" is nowhere negative, so it speaks against
    fused = FusedCAM("grad-cam", ["1", "4"])(net, volume, ClassLogit(0))
    shallow = FusedCAM("grad-cam", ["1"])(net, volume, ClassLogit(0))
    assert not fused.isnan().any()
    assert_close(fused, shallow / 2)


@pytest.mark.parametrize("cam", CAMS)
def test_fuses_every_class_activation_map(cam, volume):
    layers = ["4", "5"] if cam == "cam" else ["1", "4"]
    answer = FusedCAM(cam, layers).attribute(random_net(), volume, [ClassLogit(2)])
    assert answer.maps[0].shape == volume.shape
    assert 0 < float(answer.maps[0].abs().max()) <= 1


def test_says_that_one_layer_is_no_fusion(volume):
    answer = FusedCAM().attribute(random_net(), volume, [ClassLogit(0)])
    assert answer.notes == ["only one layer, so nothing was joined; name several with layers"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cam": "layer-cm"}, "'layer-cm' is no class activation map; did you mean 'layer-cam'"),
        ({"how": "median"}, "how is mean or max, not 'median'"),
        ({"layers": "layer4"}, "layers is a list of names"),
        ({"layers": [4]}, "layers is a list of names"),
    ],
)
def test_refuses_settings_in_words(settings, says):
    with pytest.raises(SettingError, match=says):
        FusedCAM(**settings)


def test_names_a_layer_that_is_missing(volume):
    with pytest.raises(LayerError, match="no layer 'layer9'"):
        FusedCAM(layers=["4", "layer9"])(random_net(), volume, ClassLogit(0))
