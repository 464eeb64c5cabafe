"""What holds for every method, whatever its formula.  A new method joins by its line in METHODS."""

import pytest
import torch
from conftest import SHAPE
from nets import assert_same_state, random_net, state
from torch.testing import assert_close

from volsal import (
    METHODS,
    ClassLogit,
    ClassMargin,
    GradCAM,
    GuidedBackprop,
    GuidedGradCAM,
    HiResCAM,
    InputGradient,
    PredictedClass,
)
from volsal.attribution import ModelError, TargetError, attribute

LABELS = torch.zeros(SHAPE, dtype=torch.int64)
LABELS[1:4, 2:5, :6], LABELS[5:, 6:, :4] = 1, 2
# Settings that make a method quick, or that it cannot do without.
SETTINGS = {
    "smooth-grad": {"samples": 3},
    "smooth-grad-squared": {"samples": 3},
    "var-grad": {"samples": 3},
    "integrated-gradients": {"steps": 4, "tolerance": None, "batch": 3},
    "expected-gradients": {"baselines": [0.0, 1.0], "samples": 4, "batch": 3},
    "occlusion": {"box": 4, "batch": 3},
    "rise": {"cell": 3, "masks": 10, "batch": 4},
    "region-ablation": {"labels": LABELS, "controls": 2},
}
# Forward passes of the whole network, of methods that need more than one.
PASSES = {
    "smooth-grad": 4,  # the scan, and each noisy copy
    "smooth-grad-squared": 4,
    "var-grad": 4,
    "integrated-gradients": 4,  # the scan, the baseline, and four points in batches of three
    "expected-gradients": 5,  # the scan, two baselines, and four points in batches of three
    "deep-lift": 2,  # the baseline and the scan
    "guided-grad-cam": 2,  # two ingredients
    "score-cam": 3,  # the scan, what hides it, its five masked copies
    "rise": 4,  # the scan, and ten masked copies in batches of four
    "region-ablation": 7,  # the scan, two regions, and two controls of each
    "ablation-cam": 4,  # the scan, twice to see whether copies may part at the layer, five ablated copies
}
# By how much a map grows when the logit doubles, where it is not 2.
GROWTH = {
    "smooth-grad-squared": 4,  # squares
    "var-grad": 4,
    "guided-grad-cam": 4,  # a product of two maps
    "eigen-cam": 1,  # does not look at the score
    "fused-cam": 1,  # to each layer's own scale
}
# What is drawn at random is drawn voxel by voxel in the array's order.
DRAWN = {"smooth-grad", "smooth-grad-squared", "var-grad", "rise"}
OTHERWISE = {
    "grad-cam-plus-plus": "its weights are derived for the exponential of the score, and do not grow in proportion",
}


@pytest.fixture(params=METHODS)
def method(request):
    settings = dict(SETTINGS.get(request.param, {}))
    if "labels" in settings and "axes" in request.fixturenames and request.getfixturevalue("axes") == 2:
        settings["labels"] = settings["labels"][..., 0]
    return METHODS[request.param](**settings)


@pytest.fixture(params=[2, 3], ids=["2D", "3D"])
def axes(request):
    return request.param


@pytest.fixture
def inputs(volume, axes):
    return volume if axes == 3 else volume[..., 0]


def test_ids_are_the_names_they_are_registered_under():
    assert all(kind.id == name and name == name.lower() and " " not in name for name, kind in METHODS.items())


def test_a_volume_has_the_same_map_alone_and_in_a_batch(method, axes, inputs):
    net = random_net(axes=axes)
    together = method(net, inputs, PredictedClass())
    assert_close(together, torch.cat([method(net, one[None], PredictedClass()) for one in inputs]))


def test_several_targets_share_one_forward_pass_and_change_nothing(method, axes, inputs):
    net = random_net(axes=axes)
    targets = [ClassLogit(0), ClassLogit(2), ClassMargin(2, 0), PredictedClass()]
    method(net, inputs, targets[0])  # the default layer is found once
    runs = []
    handle = net[0].register_forward_hook(lambda *_: runs.append(1))
    maps = method(net, inputs, targets)
    handle.remove()
    expected = method.passes(inputs.shape) if method.id == "occlusion" else PASSES.get(method.id, 1)
    assert len(runs) == expected
    for one, target in zip(maps, targets, strict=True):
        assert_close(one, method(net, inputs, target), rtol=0, atol=0)


def test_twice_called_is_twice_the_same(method, axes, inputs):
    net = random_net(axes=axes)
    assert_close(method(net, inputs, ClassLogit(1)), method(net, inputs, ClassLogit(1)), rtol=0, atol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_model_volume_and_random_numbers_as_they_were(method, axes, inputs, fails):
    net = random_net(axes=axes).train()
    net[5].eval()  # a mixed state must come back mixed
    net[0].weight.requires_grad_(False)
    net[2].bias.grad = torch.ones_like(net[2].bias)
    before, kept, random = state(net), inputs.clone(), torch.get_rng_state()
    if fails:
        with pytest.raises(TargetError, match="class 9 asked for, but the model has 3"):
            method(net, inputs, ClassLogit(9))
    else:
        method(net, inputs, ClassLogit(0))
    assert_same_state(before, state(net))
    assert torch.equal(inputs, kept)
    assert not inputs.requires_grad
    assert inputs.grad is None
    assert torch.equal(random, torch.get_rng_state())


def test_an_exception_in_the_middle_of_the_model_leaves_it_as_it_was(method, axes, inputs):
    net = random_net(axes=axes).train()
    before = state(net)

    def explode(*_):
        raise MemoryError("in the middle")

    handle = net[3].register_forward_hook(explode)
    with pytest.raises(Exception, match="in the middle"):
        method(net, inputs, ClassLogit(0))
    handle.remove()
    assert_same_state(before, state(net))
    assert torch.is_grad_enabled()


def test_works_on_a_frozen_model_and_in_every_grad_mode(method, axes, inputs):
    net = random_net(axes=axes)
    expected = method(net, inputs, PredictedClass())
    with torch.no_grad():
        assert_close(method(net.requires_grad_(False), inputs, PredictedClass()), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert_close(method(net, inputs.clone(), PredictedClass()), expected)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_a_volume_that_requires_grad_keeps_its_own_gradient(method, axes, inputs):
    net, leaf = random_net(axes=axes), inputs.clone().requires_grad_()
    leaf.grad = torch.ones_like(leaf)
    result = method(net, leaf, ClassLogit(0))
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    assert not result.requires_grad


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)])
def test_follows_when_the_axes_of_model_and_volume_are_permuted_together(method, volume, order):
    if method.id in DRAWN:
        pytest.skip("the noise is not turned with the volume")
    if method.id == "region-ablation":
        pytest.skip("its labels are not turned with the volume")
    net, turned = random_net(), random_net()
    permuted = (0, 1, *(2 + o for o in order))
    for a, b in zip(net.modules(), turned.modules(), strict=True):
        if isinstance(a, torch.nn.Conv3d):
            b.weight.data = a.weight.data.permute(permuted)
    result = method(turned, volume.permute(permuted), ClassLogit(0))
    assert_close(result, method(net, volume, ClassLogit(0)).permute(permuted))


def test_grows_with_the_logit(method, axes, inputs):
    net, louder = random_net(axes=axes), random_net(axes=axes)
    louder[-1].weight.data *= 2
    if method.id in OTHERWISE:
        pytest.skip(OTHERWISE[method.id])
    assert_close(method(louder, inputs, ClassLogit(0)), GROWTH.get(method.id, 2) * method(net, inputs, ClassLogit(0)))


def test_refuses_what_is_no_model_no_batch_of_volumes_and_no_target(method, axes, inputs):
    net = random_net(axes=axes)
    for model, volume, says in (
        (net.forward, inputs, "a model is a torch.nn.Module; got method"),
        (net, inputs.numpy(), r"a model input is a tensor \(B, C, \*spatial\).* got ndarray"),
        (net, inputs[:0], r"of at least one volume.* got \(0, 1, 7, 9"),
        (net, inputs[0, 0, 0], "got "),
    ):
        with pytest.raises(ModelError, match=says):
            method(model, volume, ClassLogit(0))
    for target in (1, "class-1"):
        with pytest.raises(TargetError, match=r"a target is a callable, such as volsal\.ClassLogit"):
            method.attribute(net, inputs, [target])


@pytest.mark.parametrize("owner", ["torch", "numpy"])
def test_a_model_that_writes_into_its_input_does_not_write_into_the_callers(method, inputs, axes, owner):
    net = torch.nn.Sequential(torch.nn.ReLU(inplace=True), *random_net(axes=axes))
    inputs = torch.from_numpy(inputs.numpy().copy()) if owner == "numpy" else inputs
    kept = inputs.clone()
    method(net, inputs, ClassLogit(0))
    assert torch.equal(inputs, kept)


def test_all_methods_together_need_one_pass_for_the_class_activation_maps_and_one_for_each_gradient(volume):
    net = random_net()
    methods = [GradCAM("4"), HiResCAM("4"), GradCAM("2"), GuidedBackprop(), GuidedGradCAM("4"), InputGradient()]
    apart = [method.attribute(net, volume, [ClassLogit(1), PredictedClass()]) for method in methods]
    runs = []
    handle = net[0].register_forward_hook(lambda *_: runs.append(1))
    together = attribute(net, volume, methods, [ClassLogit(1), PredictedClass()])
    handle.remove()
    assert len(runs) == 3
    for ours, alone in zip(together, apart, strict=True):
        assert_close(ours.maps, alone.maps, rtol=0, atol=1e-7)
        assert ours.layer == alone.layer
