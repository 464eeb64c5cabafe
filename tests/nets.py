"""Networks so small that their attributions are known on paper, or so awkward that hooks and modes go wrong."""

import torch
import torch.nn.functional as F
from torch import nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
POOL = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Linear3d(nn.Module):
    """score_k = mean over voxels of sum_c v_kc * w_c * x.  Its feature map is A_c = w_c * x."""

    def __init__(self, w, v):
        super().__init__()
        self.features = nn.Conv3d(1, len(w), 1, bias=False).double()
        self.head = nn.Linear(len(w), len(v), bias=False).double()
        self.features.weight.data = torch.tensor(w, dtype=torch.float64).view(-1, 1, 1, 1, 1)
        self.head.weight.data = torch.tensor(v, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3, 4)))


def random_net(seed=0, inplace=True, axes=3, channels=1):
    """Conv, in-place ReLU, strided conv, dropout, norm, pool.  Layer "4" is its last with cells."""
    torch.manual_seed(seed)
    return nn.Sequential(
        CONV[axes](channels, 4, 3, padding=1),
        nn.ReLU(inplace=inplace),
        CONV[axes](4, 5, 3, stride=2),
        NORM[axes](5),
        nn.ReLU(inplace=inplace),
        nn.Dropout(0.5),
        POOL[axes](1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ).double()


SPELLINGS = {
    "nn.ReLU": lambda x: nn.ReLU()(x),
    "nn.ReLU(inplace)": lambda x: nn.ReLU(inplace=True)(x),
    "F.relu": F.relu,
    "F.relu(inplace)": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_min_": lambda x: x.clamp_min_(0),
    "clamp(min=0)": lambda x: torch.clamp(x, min=0),
    "clip": lambda x: x.clip(0, None),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "maximum": lambda x: torch.maximum(x, torch.zeros((), dtype=x.dtype)),
    "aten.relu": torch.ops.aten.relu.default,
}


class SpelledNet(nn.Module):
    """One network whose rectifier is written in any way."""

    def __init__(self, spelling, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv3d(1, 4, 3, padding=1).double()
        self.second = nn.Conv3d(4, 6, 3, stride=2, padding=1).double()
        self.third = nn.Conv3d(6, 5, 3, padding=1).double()
        self.head = nn.Linear(5, 3).double()
        self.spelling = spelling

    def forward(self, x):
        for conv in (self.first, self.second, self.third):
            x = self.spelling(conv(x))
        return self.head(x.mean((2, 3, 4)))


class ModuleNet(SpelledNet):
    """The same with one nn.ReLU module for each place, as captum needs it."""

    def __init__(self, seed=0):
        super().__init__(nn.Identity(), seed)
        self.acts = nn.ModuleList(nn.ReLU() for _ in range(3))

    def forward(self, x):
        for conv, act in zip((self.first, self.second, self.third), self.acts, strict=True):
            x = act(conv(x))
        return self.head(x.mean((2, 3, 4)))


class Scored(nn.Module):
    """A model whose one logit is a function of the voxels, (B, V) -> (B,)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.flatten(1))[:, None]


def voxels(*values, dtype=torch.float64):
    """A volume of a row of voxels, 1 1 V 1 1."""
    return torch.tensor(values, dtype=dtype).view(1, 1, -1, 1, 1)


class Hidden(torch.autograd.Function):
    """A rectifier whose backward pass no rule can reach."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0)


class Bomb:
    """What makes the file at ``path`` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def state(net):
    """Everything of a model that a method must leave alone."""
    modules = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks),
         len(m._backward_pre_hooks), getattr(m, "inplace", None))
        for m in net.modules()
    ]  # fmt: skip
    parameters = [(id(p), p.requires_grad, p.grad is None, p._version) for p in net.parameters()]
    buffers = [b.clone() for b in net.buffers()]
    return modules, parameters, buffers


def assert_same_state(before, after):
    assert before[:2] == after[:2]
    for old, new in zip(before[2], after[2], strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)
