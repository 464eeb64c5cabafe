"""captum, an independent implementation, as the oracle where it is right."""

import pytest
import torch
from nets import SPELLINGS, ModuleNet, SpelledNet
from torch.testing import assert_close

from volsal import ClassLogit, GradCAM, GuidedBackprop, GuidedGradCAM, HiResCAM, InputGradient

attr = pytest.importorskip("captum.attr", reason="captum is not installed")
nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")

pytestmark = [
    # captum announces what it sets on the way; torch warns of hooks on inputs that need no gradient.
    pytest.mark.filterwarnings("ignore:Setting (forward|backward):UserWarning"),
    pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients:UserWarning"),
]

ARCHITECTURES = {
    "resnet18": (lambda: nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=3), ["layer4", "layer2"]),
    "densenet121": (
        lambda: nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=3),
        ["features.denseblock4", "features.transition2"],
    ),
    "seresnet50": (lambda: nets.SEResNet50(spatial_dims=3, in_channels=1, num_classes=3), ["layer4", "layer3"]),
    "efficientnet": (
        lambda: nets.EfficientNetBN("efficientnet-b0", spatial_dims=3, in_channels=1, num_classes=3, pretrained=False),
        ["_bn1", "_conv_head"],
    ),
}
BOTH = [(name, layer) for name, (_, layers) in ARCHITECTURES.items() for layer in layers]


# Its first stage keeps the input's resolution, so that it needs a smaller one to be as quick, and gets as many cells.
SIZES = {"resnet18": (16, 20, 28)}


def size_of(name):
    return SIZES.get(name, (32, 40, 48))


def build(name, dtype=torch.float32):
    torch.manual_seed(3)
    model = ARCHITECTURES[name][0]().to(dtype)
    with torch.no_grad():  # normalisation statistics of a net that has seen data
        model.train()(torch.randn(2, 1, *size_of(name), dtype=dtype))
    return model.eval()


def volumes(name, batch, dtype=torch.float32):
    return torch.randn(batch, 1, *size_of(name), dtype=dtype, generator=torch.Generator().manual_seed(5))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.float32), (2, torch.float64)])
@pytest.mark.parametrize(("name", "layer"), BOTH)
def test_grad_cam_is_captums(name, layer, batch, dtype):
    model, x = build(name, dtype), volumes(name, batch, dtype)
    module = dict(model.named_modules())[layer]
    maps = GradCAM(layer)(model, x, [ClassLogit(index) for index in range(3)])
    expected = [
        attr.LayerGradCam(model, module).attribute(x, target=index, relu_attributions=True).detach()
        for index in range(3)
    ]
    top = max(float(e.max()) for e in expected)
    assert top > 0
    for ours, theirs in zip(maps, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * top)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), BOTH[:4])
def test_hires_cam_is_captums_layer_gradient_times_activation(name, layer):
    model, x = build(name), volumes(name, 2)
    module = dict(model.named_modules())[layer]
    expected = attr.LayerGradientXActivation(model, module).attribute(x, target=1).sum(1, keepdim=True).detach()
    assert_close(HiResCAM(layer)(model, x, ClassLogit(1)), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "seresnet50"])
def test_guided_backprop_and_the_gradient_are_captums(name):
    model, x = build(name), volumes(name, 2)
    for ours, theirs in ((GuidedBackprop(), attr.GuidedBackprop), (InputGradient(), attr.Saliency)):
        options = {"abs": False} if theirs is attr.Saliency else {}
        expected = theirs(model).attribute(x, target=1, **options).detach()
        assert_close(ours(model, x, ClassLogit(1)), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_guided_backprop_is_captums_of_the_module_net_in_every_spelling(spelling, volume):
    expected = attr.GuidedBackprop(ModuleNet()).attribute(volume, target=2)
    result = GuidedBackprop()(SpelledNet(SPELLINGS[spelling]), volume, ClassLogit(2))
    assert_close(result, expected)


def test_guided_grad_cam_is_captums_with_linear_upsampling(volume):
    net = ModuleNet()
    expected = attr.GuidedGradCam(net, net.acts[2]).attribute(volume, target=0, interpolate_mode="trilinear")
    assert_close(GuidedGradCAM("acts.2")(net, volume, ClassLogit(0)), expected.detach())
