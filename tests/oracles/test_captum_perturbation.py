"""captum's occlusion and feature ablation, an independent implementation, with equal windows and baselines."""

import pytest
import torch
from conftest import SHAPE
from nets import random_net
from torch.testing import assert_close

from volsal import ClassLogit, Occlusion, RegionAblation

attr = pytest.importorskip("captum.attr", reason="captum is not installed")
nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")


def architecture(name, dtype):
    torch.manual_seed(2)
    model = {
        "plain": lambda: random_net(channels=2),
        "resnet": lambda: nets.ResNet(
            "basic", [1, 1, 1, 1], [8, 8, 16, 16], spatial_dims=3, n_input_channels=2, num_classes=3
        ),
        "densenet": lambda: nets.DenseNet(
            spatial_dims=3, in_channels=2, out_channels=3, init_features=8, growth_rate=4, block_config=(2, 2)
        ),
        "vit": lambda: nets.ViT(
            in_channels=2, img_size=(16, 16, 16), patch_size=(8, 8, 8), classification=True, num_classes=3,
            hidden_size=24, mlp_dim=32, num_layers=2, num_heads=4,
        ),
    }[name]().to(dtype)  # fmt: skip
    if name == "vit":  # the class answer comes with its hidden states
        model = First(model)
    return model.eval()


class First(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


# Boxes that fit their lattice to the voxel, so that captum's, which start at 0, are the same.
@pytest.mark.parametrize(("edge", "step"), [((8, 4, 10), (4, 4, 6)), ((16, 3, 8), (1, 1, 8))])
@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.float64), (3, torch.float32)])
@pytest.mark.parametrize("name", ["plain", "resnet", "densenet", "vit"])
def test_occlusion_is_captums(name, dtype, batch, edge, step):
    model = architecture(name, dtype)
    x = torch.randn(batch, 2, 16, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = attr.Occlusion(model).attribute(
            x, sliding_window_shapes=(2, *edge), strides=(2, *step), target=1, baselines=0.5
        )
    assert float((expected[:, 0] - expected[:, 1]).abs().max()) == 0
    ours = Occlusion(box=edge, stride=step, fill=0.5, batch=4)(model, x, ClassLogit(1))
    assert_close(ours[:, 0], expected[:, 0].to(ours), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["plain", "resnet"])
def test_occlusion_of_each_channel_is_captums(name):
    model = architecture(name, torch.float64)
    x = torch.randn(2, 2, 16, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = attr.Occlusion(model).attribute(
            x, sliding_window_shapes=(1, 8, 8, 8), strides=(1, 4, 8, 8), target=0
        )
    ours = Occlusion(box=8, stride=(4, 8, 8), fill="zero", channels="each", batch=3)(model, x, ClassLogit(0))
    assert_close(ours, expected.double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["plain", "densenet"])
def test_region_ablation_is_captums_feature_ablation(name, batch):
    model = architecture(name, torch.float64)
    x = torch.randn(batch, 2, 16, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    labels = torch.zeros(16, 16, 16, dtype=torch.int64)
    labels[2:7, 3:9, 1:5], labels[9:, 9:, 9:], labels[0, :, 15] = 1, 2, 3
    fill = x.mean((2, 3, 4), keepdim=True)
    with torch.no_grad():
        expected = attr.FeatureAblation(model).attribute(
            x, feature_mask=labels[None, None], baselines=fill.expand_as(x), target=2
        )
    ours = RegionAblation(labels=labels, fill="mean", controls=2)(model, x, ClassLogit(2))
    inside = labels > 0
    assert_close(ours[:, 0][:, inside], expected[:, 0][:, inside])
    assert not ours[:, 0][:, ~inside].any()


def test_boxes_that_do_not_fit_are_captums_feature_ablation_one_by_one():
    model = architecture("plain", torch.float64)
    x = torch.randn(1, 2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    # 7 = 2 + 3 + 2, 9 = 3 + 3 + 3, 11 = 3 + 3 + 3 + 2: boxes side by side are a segmentation.
    ids = torch.stack(
        torch.meshgrid(torch.tensor([0, 0, 1, 1, 1, 2, 2]), torch.arange(9) // 3, torch.arange(11) // 3, indexing="ij")
    )
    labels = ids[0] * 100 + ids[1] * 10 + ids[2]
    labels = labels.unique(return_inverse=True)[1]
    with torch.no_grad():
        expected = attr.FeatureAblation(model).attribute(x, feature_mask=labels[None, None], target=0)
    ours = Occlusion(box=3, stride=3, fill="zero")(model, x, ClassLogit(0))
    assert_close(ours[:, 0], expected[:, 0])
