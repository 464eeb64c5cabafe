"""Winograd's convolution against torch's in double precision, and where a fast copy takes it."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from volsal.attribution import ClassLogit, GradCAM
from volsal.attribution.alignment.following import Following
from volsal.models import winograd
from volsal.models.fast import fast

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.mark.parametrize("slab", [1, 2500, 1 << 22])
@pytest.mark.parametrize("shape", [(5, 7, 9), (8, 6, 11), (1, 12, 10), (2, 9, 9), (13, 4, 5)])
@pytest.mark.parametrize(
    ("kernel", "padding"),
    [((3, 3, 3), (1, 1, 1)), ((3, 1, 1), (1, 0, 0)), ((3, 3, 5), (2, 0, 1)), ((3, 3, 3), (1, 4, 2))],
)
@pytest.mark.parametrize(("batch", "layout"), [(1, torch.channels_last_3d), (3, torch.contiguous_format)])
def test_it_is_the_convolution(monkeypatch, slab, shape, kernel, padding, batch, layout):
    monkeypatch.setattr(winograd, "_SLAB", slab)
    torch.manual_seed(0)
    volume = torch.randn(batch, 4, *shape).contiguous(memory_format=layout)
    weight, bias = torch.randn(6, 4, *kernel), torch.randn(6) if batch > 1 else None
    expected = torch.conv3d(volume.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
    found = winograd.convolve(volume, weight, bias, list(padding))
    assert_close(found.double(), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


def test_neither_input_nor_weights_are_changed():
    volume, weight = torch.randn(1, 4, 6, 5, 5), torch.randn(3, 4, 3, 3, 3)
    before = volume.clone(), weight.clone()
    winograd.convolve(volume, weight, None, [1, 1, 1])
    assert all(map(torch.equal, (volume, weight), before))


@pytest.mark.parametrize(
    ("conv", "taken"),
    [
        (nn.Conv3d(32, 64, 3, padding=1), True),
        (nn.Conv3d(32, 64, (3, 5, 3)), True),
        (nn.Conv3d(64, 64, (3, 1, 1)), False),
        (nn.Conv3d(16, 128, 3, padding=1), False),
        (nn.Conv3d(128, 16, 3, padding=1), False),
        (nn.Conv3d(64, 64, 3, padding=1, stride=2), False),
        (nn.Conv3d(64, 64, 3, padding=1, dilation=(1, 1, 2)), False),
        (nn.Conv3d(64, 64, (1, 5, 5)), False),
        (nn.Conv3d(64, 64, 3, padding=(3, 0, 0)), False),
        (nn.Conv3d(128, 128, 3, padding=1, groups=4), False),
        (nn.Conv2d(256, 256, 3, padding=1), False),
    ],
)
def test_large_plain_ones_of_three_taps_are_worthwhile(conv, taken):
    assert winograd.is_worthwhile(conv, torch.empty(1, 1, 48, 48, 48)) is taken
    for small in ((8, 8, 8), (5, 128, 128)):
        assert not winograd.is_worthwhile(conv, torch.empty(1, 1, *small))


def test_of_many_channels_it_is_worthwhile_on_a_smaller_map_though_not_on_any():
    conv = nn.Conv3d(512, 512, 3, padding=1)
    assert winograd.is_worthwhile(conv, torch.empty(1, 1, 8, 8, 8))
    assert not winograd.is_worthwhile(conv, torch.empty(1, 1, 7, 7, 7))


@pytest.fixture
def narrow(monkeypatch):
    """Small nets take it too."""
    monkeypatch.setattr(winograd, "_CHANNELS", 4)
    monkeypatch.setattr(winograd, "_MULTIPLICATIONS", 0)
    monkeypatch.setattr(winograd, "_CELLS", 0)
    monkeypatch.setattr(winograd, "_PLANES", 0)


def net_and_volume():
    torch.manual_seed(0)
    parts = [nn.Conv3d(4, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1, groups=2)]
    net = nn.Sequential(*parts, nn.MaxPool3d(2), nn.Conv3d(8, 8, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    return net.eval(), torch.randn(1, 4, 9, 11, 10)


class Named(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the convolutions that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in func.name():
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_fast_copy_takes_it_but_in_groups_and_where_gradients_are_followed(narrow):
    net, volume = net_and_volume()
    quick = fast(net, volume)
    with torch.no_grad(), Named() as plain:
        found = quick(volume)
    assert plain.seen == ["volsal::convolution", "aten::mkldnn_convolution", "volsal::convolution"]
    assert_close(found, net(volume), rtol=1e-5, atol=1e-5)
    asked = volume.clone().requires_grad_()
    with Named() as followed:
        quick(asked).sum().backward()
    assert set(followed.seen) == {"aten::convolution", "aten::convolution_backward"}


def test_maps_of_such_a_copy_are_the_models(narrow):
    net, volume = net_and_volume()
    for layer in ("5", "3"):
        ours, theirs = (GradCAM(layer)(model, volume, ClassLogit(2)) for model in (fast(net, volume), net))
        assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_cells_keep_their_places_through_it(narrow):
    net, volume = net_and_volume()
    quick = fast(net, volume)
    places = []
    for model in (net, quick):
        with torch.no_grad(), Following(volume) as following:
            cells = model[:6](volume)
        places.append(following.fates[cells])
    assert places[0] == places[1]
