import pickle
import textwrap

import numpy as np
import pytest
import torch
from nets import Bomb, random_net
from safetensors.torch import save_file
from torch import nn

from volsal import load_model
from volsal.attribution import ModelError
from volsal.errors import VolsalError
from volsal.models import weights_digest
from volsal.models.load import read_weights

FACTORY = """
import torch
from torch import nn

def build(width=4):
    return nn.Sequential(nn.Conv3d(1, width, 3), nn.BatchNorm3d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width, 2))

def broken():
    raise RuntimeError("no such thing")

def number():
    return 3

def lazy():
    return nn.LazyConv3d(2, 3)

def meta():
    return nn.Conv3d(1, 2, 3, device="meta")

VALUE = 7
"""


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "my nets.py"
    path.write_text(textwrap.dedent(FACTORY))
    return path


@pytest.fixture
def trained(factory):
    model = load_model(f"{factory}:build")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(number + 0.5)
    return model


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_factory_in_a_package_is_called_with_its_arguments():
    model = load_model("torch.nn:Conv3d", {"in_channels": 2, "out_channels": 3, "kernel_size": 1})
    assert isinstance(model, nn.Conv3d)
    assert not model.training


@pytest.mark.parametrize("how", ["safetensors", "plain", "nested", "parallel"])
def test_weights_come_from_every_plain_form(how, factory, trained, tmp_path):
    state = trained.state_dict()
    path = tmp_path / ("w.safetensors" if how == "safetensors" else "w.pt")
    if how == "safetensors":
        save_file(state, path)
    else:
        content = {"plain": state, "nested": {"epoch": 3, "state_dict": state}}.get(how)
        torch.save(content or {f"module.{name}": tensor for name, tensor in state.items()}, path)
    model = load_model("my nets.py:build", {"width": 4}, path.name, folder=tmp_path)
    assert equal(model, trained)
    assert weights_digest(model) == weights_digest(trained) != weights_digest(load_model(f"{factory}:build"))


def refusals(tmp_path, factory, trained):
    state = trained.state_dict()
    build = f"{factory}:build"

    def saved(name, content):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    def to(kind):
        return {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in state.items()}

    renamed = {name.replace("4.", "head."): tensor for name, tensor in state.items()}
    poisoned = {name: tensor.clone() for name, tensor in state.items()}
    poisoned["0.bias"][1] = float("nan")
    (tmp_path / "page.pt").write_text("<html>")
    (tmp_path / "page.safetensors").write_text("<html>")
    (tmp_path / "empty.pt").touch()
    return [
        (build, saved("a.pt", renamed), "2 missing (4.weight, 4.bias); 2 not in the model (head.weight, head.bias)"),
        (
            build,
            saved("b.pt", state | {"0.bias": torch.zeros(3)}),
            "1 of another shape (0.bias (file (3,), model (4,)))",
        ),
        (build, saved("c.pt", poisoned), "1 of 4 values of '0.bias' are NaN"),
        (
            build,
            saved("x.pt", {n: t for n, t in state.items() if n != "4.bias"}),
            "do not match the model: 1 missing (4.bias);",
        ),
        (build, saved("y.pt", state | {"more": torch.zeros(1)}), "do not match the model: 1 not in the model (more);"),
        (build, saved("d.pt", {"epoch": 3}), "holds a dict with keys epoch, not a state dict"),
        (build, saved("e.pt", trained), "holds more than tensors (GLOBAL torch.nn.modules.container.Sequential"),
        (build, saved("i.pt", {0: torch.zeros(3)}), "holds a dict with keys 0, not a state dict"),
        (build, saved("m.pt", to("meta")), "of another type (0.weight (file float32 without values, model float32)"),
        (build, saved("q.pt", to(torch.int8)), "of another type (0.weight (file int8, model float32)"),
        (build, saved("k.pt", to(torch.complex64)), "of another type (0.weight (file complex64, model float32)"),
        (
            build,
            saved("s.pt", state | {"4.weight": state["4.weight"].to_sparse()}),
            "1 of another type (4.weight (file float32 sparse_coo, model float32))",
        ),
        (f"{factory}:lazy", saved("l.pt", state), "'weight' of the model has no place for values"),
        (f"{factory}:meta", saved("n.pt", state), "'weight' of the model has no place for values"),
        (build, tmp_path / "page.pt", "not a sound weights file"),
        (build, tmp_path / "page.safetensors", "not a sound safetensors file"),
        (build, tmp_path / "gone.pt", "no such file"),
        (f"{factory}:biuld", None, "has no 'biuld'; did you mean 'build'"),
        (f"{factory}:broken", None, "fails: RuntimeError: no such thing"),
        (f"{factory}:number", None, "returned a int, not a torch.nn.Module"),
        (f"{factory}:VALUE", None, "a int, not a factory"),
        (str(tmp_path / "none.py") + ":build", None, "no such file"),
        ("no_such_package.nets:build", None, "is the package installed"),
        ("whole_model.pt", None, "a pickled model, which is a program; name a factory"),
        ("model.onnx", None, "ONNX graph has no gradients"),
        ("model", None, "not a model volsal can load"),
        ("weights.safetensors", None, "weights, whose architecture is missing; name a factory"),
        (str(tmp_path), None, "model: {bundle: FOLDER}"),
        ("bundle.zip", None, "unpack it and name its folder"),
        (str(tmp_path / "empty.pt"), None, "the file is empty"),
    ]


@pytest.mark.parametrize("number", range(30))
def test_refuses_in_one_line(number, tmp_path, factory, trained):
    source, weights, says = refusals(tmp_path, factory, trained)[number]
    with pytest.raises(VolsalError) as raised:
        load_model(source, weights=weights)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrap", [lambda bomb, state: bomb, lambda bomb, state: {"state_dict": state, "extra": bomb}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_is_refused_and_never_run(wrap, zipped, tmp_path, factory, trained):
    canary = tmp_path / "canary"
    content = wrap(Bomb(canary), trained.state_dict())
    if zipped:
        torch.save(content, tmp_path / "w.pt")
    else:
        (tmp_path / "w.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(ModelError, match="holds more than tensors"):
        load_model(f"{factory}:build", weights=tmp_path / "w.pt")
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_weights_are_refused_whatever_torch_makes_of_them(zipped, tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(3, 2)}, path, _use_new_zipfile_serialization=zipped)
    sound, random = path.read_bytes(), np.random.default_rng(0)
    said = []
    for _ in range(300):
        damaged = bytearray(sound)
        damaged[random.integers(2, len(sound))] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except ModelError as error:
            said.append(str(error))
    assert 60 < len(said) < 300
    assert not [text for text in said if "\n" in text]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path, factory):
    torch.jit.save(torch.jit.script(nn.Conv3d(1, 1, 1)), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="a TorchScript archive, which is a program"):
        load_model(f"{factory}:build", weights=tmp_path / "w.pt")


def test_half_precision_weights_fill_a_float32_model(factory, trained, tmp_path):
    save_file(
        {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in trained.state_dict().items()
        },
        tmp_path / "w.safetensors",
    )
    model = load_model(f"{factory}:build", weights=tmp_path / "w.safetensors")
    assert next(model.parameters()).dtype == torch.float32
    assert equal(model, trained)


def test_the_digest_sees_a_single_changed_weight_and_its_name():
    one, other = random_net(), random_net()
    assert weights_digest(one) == weights_digest(other)
    other[0].bias.data[0] += 1e-9
    assert weights_digest(one) != weights_digest(other)
