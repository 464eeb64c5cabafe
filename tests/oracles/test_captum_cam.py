"""captum as the oracle of class activation maps beside Grad-CAM: channel by channel, and by ablation."""

import pytest
import torch
from nets import ModuleNet, random_net
from torch.testing import assert_close

from volsal import AblationCAM, ClassLogit, GradCAM, HiResCAM

attr = pytest.importorskip("captum.attr", reason="captum is not installed")
nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:Setting (forward|backward):UserWarning")

# The last of the UNet's layers is passed by a skip connection.
ARCHITECTURES = {
    "plain": (ModuleNet, "acts.1"),
    "batch-norm": (lambda: random_net(inplace=False), "2"),
    "resnet10": (
        lambda: nets.resnet10(spatial_dims=3, n_input_channels=1, num_classes=3, widen_factor=0.125),
        "layer2",
    ),
    "densenet": (
        lambda: nets.DenseNet(3, 1, 3, init_features=4, growth_rate=4, block_config=(2, 2)),
        "features.transition1",
    ),
    "unet": (
        lambda: torch.nn.Sequential(
            nets.UNet(3, 1, 3, channels=(4, 6, 8), strides=(2, 2)), torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten()
        ),
        "0.model.1.submodule.1",
    ),
}


@pytest.fixture(params=ARCHITECTURES)
def case(request):
    torch.manual_seed(3)
    make, layer = ARCHITECTURES[request.param]
    model = make().double()
    with torch.no_grad():  # normalisation statistics of a net that has seen data
        model.train()(torch.randn(4, 1, 24, 24, 24, dtype=torch.float64))
    return model.eval(), layer, model.get_submodule(layer)


def volumes(batch):
    return torch.randn(batch, 1, 16, 24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("batch", [1, 3])
def test_ablation_cam_weighs_channels_by_captums_layer_feature_ablation(case, batch):
    model, layer, module = case
    x = volumes(batch)
    activation = attr.LayerActivation(model, module).attribute(x).detach()
    numbers = torch.arange(activation.shape[1]).reshape(1, -1, *[1] * (activation.ndim - 2))
    with torch.no_grad():
        lost = attr.LayerFeatureAblation(model, module).attribute(
            x, target=0, layer_mask=numbers.expand_as(activation[:1])
        )
    expected = (lost.to(activation) * activation).sum(1, keepdim=True).relu()
    assert float(expected.max()) > 0
    # captum keeps the differences in float32.
    assert_close(AblationCAM(layer)(model, x, ClassLogit(0)), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_the_parts_of_hires_cam_are_captums_gradient_times_activation(case):
    model, layer, module = case
    x = volumes(2)
    expected = attr.LayerGradientXActivation(model, module).attribute(x, target=2).detach()
    (parts,) = HiResCAM(layer, features="all").attribute(model, x, [ClassLogit(2)]).parts
    assert_close(parts, expected)


def test_the_parts_of_grad_cam_sum_to_captums_before_its_relu(case):
    model, layer, module = case
    x = volumes(2)
    expected = attr.LayerGradCam(model, module).attribute(x, target=0, relu_attributions=False).detach()
    (parts,) = GradCAM(layer, features="all").attribute(model, x, [ClassLogit(0)]).parts
    assert float(expected.min()) < 0
    assert_close(parts.sum(1, keepdim=True), expected)
