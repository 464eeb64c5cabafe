"""Phantoms with planted evidence, and networks that are known to look at it: nothing here is learned unless asked."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import torch
from torch import nn

from volsal import Explainer
from volsal.scans.find import Case

SIZE, MM = 24, 6.0
# What a model may answer by, and the verdict that should then say so; of the first two there is nothing to say.
HONEST = ("lesion", "side")
CUES = {
    "lesion": None,
    "side": None,
    "marker": "outside the body",
    "edge": "outside the body",
    "air": "outside the body",
    "line": "fixed in the field",
    "dot": "fixed in the field",
    "brightness": "overall brightness",
    "noise": "noise and sharpness",
    "size": "size of the patient",
    "position": "position in the field",
}
# Where they lie, in voxels: left, posterior, inferior of the head, in the air; at the right end; in the head.
MARKER = (slice(2, 5), slice(2, 5), slice(2, 5))
EDGE = (slice(22, 24), slice(9, 14), slice(9, 14))
DOT = (slice(13, 15), slice(8, 10), slice(13, 15))


def phantom(random, cue, present, size=SIZE, lesion=None):
    """(size,)*3 array of a head that lies a little elsewhere each time, and the mask of what was planted."""
    scale = size / SIZE
    index = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1) / scale
    centre = 11.5 + random.uniform(-2, 2, 3)
    if cue == "position":
        centre[1] = 11.5 + (2 if present else -2) + random.uniform(-1, 1)
    radii = random.uniform((6, 7, 6), (7, 8.5, 7)) * ((1.15 if present else 0.9) if cue == "size" else 1)
    inside = (((index - centre) / radii) ** 2).sum(-1) <= 1
    image = random.normal(0, 0.03, (size,) * 3)
    if present and cue in ("noise", "air"):
        image *= 4
    texture = np.kron(random.normal(0, 0.1, (4,) * 3), np.ones((-(-size // 4),) * 3))[:size, :size, :size]
    tissue = random.uniform(0.9, 1.1) + texture + (0.25 * image if cue == "air" and present else image)
    image = np.where(inside, tissue, np.abs(image))
    mask = np.zeros(image.shape, bool)
    if cue in HONEST or lesion:
        where = centre + random.uniform(-2.5, 2.5, 3)
        if cue == "side":
            where[0] = centre[0] + random.uniform(1.5, 3.5) * (1 if present else -1)
        mask = ((index - where) ** 2).sum(-1) <= 2.2**2
    elif cue in ("marker", "edge", "dot"):
        box = {"marker": MARKER, "edge": EDGE, "dot": DOT}[cue]
        mask[tuple(slice(round(s.start * scale), round(s.stop * scale)) for s in box)] = True
    elif cue == "line":  # at one height of the field, through whatever lies there
        mask[:, :, round(9 * scale) : round(10 * scale)] = True
    if not present and cue != "side":
        mask[:] = False
    if cue == "brightness":
        return image * (1.8 if present else 1.0) * random.uniform(0.9, 1.1), mask
    return image + 1.6 * mask, mask


def cases(folder, cue, count, seed=0, size=SIZE, masks=False):
    """Files of phantoms, half of them with the cue."""
    found = []
    for number in range(count):
        random = np.random.default_rng((seed, number))
        image, mask = phantom(random, cue, number % 2 == 0, size)
        affine = np.diag([MM * SIZE / size] * 3 + [1.0])
        affine[:3, 3] = -MM * SIZE / 2
        path = folder / f"{cue}-{number:02d}.nii.gz"
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), path)
        beside = folder / f"{cue}-{number:02d}_mask.nii.gz"
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), beside)
        given = {"evidence": beside} if masks else {}
        groups = {"site": "ab"[number % 2]}
        found.append(Case(path.name.split(".")[0], (path,), label=str(1 - number % 2), masks=given, groups=groups))
    return found


def explainer(net, targets="predicted-class", methods="gradient-x-input"):
    """Of a network that takes the phantoms as they are."""
    return Explainer(net, None, methods, targets)


class Bright(nn.Module):
    """Class 1 where a few voxels together are brighter than tissue ever is, in ``where`` (None: anywhere)."""

    def __init__(self, where=None, size=SIZE):
        super().__init__()
        seen = torch.zeros(1, 1, size, size, size)
        seen[(0, 0, *(where or (slice(None),) * 3))] = 1
        self.register_buffer("seen", seen)
        self.mean = nn.Conv3d(1, 1, 3, padding=1)
        self.head = nn.Linear(1, 2)
        self.mean.weight.data.fill_(1 / 27)
        self.mean.bias.data.fill_(-0.5 if where else -1.7)
        self.head.weight.data = torch.tensor([[-1.0], [1.0]])
        self.head.bias.data = torch.tensor([2.0, -2.0])

    def forward(self, x):
        return self.head(60 * torch.relu(self.mean(x * self.seen)).amax((2, 3, 4)))


class Level(nn.Module):
    """Class 1 where the scan as a whole is bright."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Conv3d(1, 1, 1)
        self.gain.weight.data.fill_(1.0)
        self.gain.bias.data.fill_(0.0)
        self.head = nn.Linear(1, 2)
        self.head.weight.data = torch.tensor([[-20.0], [20.0]])
        self.head.bias.data = torch.tensor([4.0, -4.0])

    def forward(self, x):
        return self.head(torch.relu(self.gain(x)).mean((2, 3, 4)))


class Plane(nn.Module):
    """Class 1 where the plane of the cue "line" is bright as a whole: no ball holds much of it."""

    def __init__(self, at=9, size=SIZE):
        super().__init__()
        self.gain = nn.Conv3d(1, 1, 1)
        self.gain.weight.data.fill_(1.0)
        self.gain.bias.data.fill_(0.0)
        self.head = nn.Linear(size, 2)
        self.head.weight.data.zero_()
        self.head.weight.data[:, at] = torch.tensor([-5.0, 5.0])
        self.head.bias.data = torch.tensor([5.0, -5.0])

    def forward(self, x):
        return self.head(torch.relu(self.gain(x)).mean((1, 2, 3)))


class Either(nn.Module):
    """Class 1 by a lesion, as of `Bright`; class 0 by the bright plane of `Plane`."""

    def __init__(self):
        super().__init__()
        self.lesion, self.plane = Bright(), Plane()
        self.lesion.mean.bias.data.fill_(-2.2)  # brighter than the plane with what surrounds it

    def forward(self, x):
        return self.lesion(x) + self.plane(x).flip(1)


def small_net(seed=0, norm=True):
    """Three strided convolutions and a mean, of random weights."""
    torch.manual_seed(seed)
    layers = []
    for wide, wider in ((1, 8), (8, 16), (16, 24)):
        layers += [nn.Conv3d(wide, wider, 3, 2, 1), nn.BatchNorm3d(wider) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(24, 2)).eval()


def pooled_net(seed=0):
    """Another kind: small kernels with maximum pooling, no normalisation."""
    torch.manual_seed(seed)
    layers = []
    for wide, wider in ((1, 8), (8, 16), (16, 16)):
        layers += [nn.Conv3d(wide, wider, 3, padding=1), nn.LeakyReLU(0.01), nn.MaxPool3d(2)]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(16, 2)).eval()


class _Residual(nn.Module):
    def __init__(self, wide, wider):
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(wide, wider, 3, 2, 1, bias=False), nn.BatchNorm3d(wider))
        self.second = nn.Sequential(nn.Conv3d(wider, wider, 3, 1, 1, bias=False), nn.BatchNorm3d(wider))
        self.beside = nn.Conv3d(wide, wider, 1, 2)

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))) + self.beside(x))


def residual_net(seed=0):
    """A third kind: residual blocks, ReLUs that are functions."""
    torch.manual_seed(seed)
    blocks = [_Residual(wide, wider) for wide, wider in ((1, 8), (8, 16), (16, 32))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 2)).eval()


NETS = {"strided": small_net, "pooled": pooled_net, "residual": residual_net}


def kept(folder, kind, cue, seed):
    """A trained net and its accuracy, from the folder where it is there already."""
    file = folder / f"{kind}_{cue}_{seed}.pt"
    if not file.exists():
        net, accuracy = trained(NETS[kind](seed), cue, seed=seed)
        torch.save({"state": net.state_dict(), "accuracy": accuracy}, file)
    found = torch.load(file, weights_only=True)
    net = NETS[kind](seed)
    net.load_state_dict(found["state"])
    return net.eval(), found["accuracy"]


def trained(net, cue, steps=200, seed=0, size=SIZE):
    """The net, trained on 256 phantoms of the cue, and its accuracy on 64 others."""
    random = np.random.default_rng((seed, 77))
    made = [phantom(random, cue, bool(at % 2), size)[0] for at in range(320)]
    volumes, labels = torch.tensor(np.array(made), dtype=torch.float32)[:, None], torch.arange(320) % 2
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    torch.manual_seed(seed)
    net.train()
    for _ in range(steps):
        chosen = torch.randint(256, (16,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(volumes[chosen]), labels[chosen]).backward()
        optimiser.step()
    net.eval()
    with torch.no_grad():
        return net, float((net(volumes[256:]).argmax(1) == labels[256:]).float().mean())
