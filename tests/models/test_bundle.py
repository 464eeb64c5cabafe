"""MONAI bundles: what they give against MONAI's own parser, and what they must not get to run."""

import json
import pickle
import shutil
import sys
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from nets import Bomb
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from volsal import Windows, load_bundle, load_config
from volsal.attribution import ModelError
from volsal.attribution.windows.windowed import Windowed
from volsal.batch import Run
from volsal.cli import app
from volsal.config import ConfigError
from volsal.errors import VolsalError
from volsal.explain import Explainer
from volsal.models.bundle import would_run
from volsal.models.bundle_config import known
from volsal.scans import read_scan

NETWORKS = {
    "classifier": {
        "_target_": "DenseNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "init_features": 4,
        "growth_rate": 2, "block_config": [1, 1],
    },
    "segmenter": {
        "_target_": "monai.networks.nets.unet.UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2,
        "channels": [4, 8], "strides": [2], "norm": ["instance", {"affine": True}],
    },
}  # fmt: skip
STEPS = {
    "classifier": [
        {"_target_": "Orientationd", "keys": "@image_key", "axcodes": "RAS"},
        {"_target_": "Spacingd", "keys": ["@image_key"], "pixdim": "@spacing::coarse", "mode": ["bilinear"]},
        {"_target_": "monai.transforms.intensity.dictionary.ScaleIntensityd", "keys": "@image_key"},
        {"_target_": "ResizeWithPadOrCropd", "keys": "@image_key", "spatial_size": [16, 12, 10]},
    ],
    "segmenter": [
        {"_target_": "Orientationd", "keys": "@image_key", "axcodes": "LPS"},
        {"_target_": "Compose", "transforms": [
            {"_target_": "CropForegroundd", "keys": "@image_key", "source_key": "@image_key", "margin": 1},
            {"_target_": "NormalizeIntensityD", "keys": "@image_key", "nonzero": True, "channel_wise": True},
        ]},
        {"_target_": "Spacingd", "keys": ["label", "@image_key"], "pixdim": [2, 2, 2], "mode": ["nearest", "bilinear"],
         "allow_missing_keys": True},
    ],
}  # fmt: skip
LOADING = [
    {"_target_": "LoadImaged", "keys": "@image_key", "reader": "NibabelReader"},
    {"_target_": "EnsureChannelFirstd", "keys": "@image_key"},
]
INFERER = {
    "_target_": "SlidingWindowInferer", "roi_size": [12, 12, 12], "sw_batch_size": 2, "overlap": "@sw#overlap",
    "mode": "gaussian", "padding_mode": "replicate", "sw_device": "@device",
}  # fmt: skip


@pytest.fixture
def bundle(tmp_path):
    """A function that writes a bundle, with changes to its config, and returns its folder."""

    def write(kind="classifier", ending="json", name="a bundle", **changes):
        folder = tmp_path / name
        for part in ("configs", "models"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        ensure = [{"_target_": "EnsureTyped", "keys": "@image_key", "device": "@device"}]
        content = {
            # The first six are as in bundles that people share: no part of what is built here.
            "imports": ["$import glob", "$import os"],
            "bundle_root": ".",
            "output_dir": "$@bundle_root + '/eval'",
            "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
            "datalist": "$sorted(glob.glob('/nowhere/*.nii.gz'))",
            "run": ["$@evaluator.run()"],
            "image_key": "image",
            "spacing": {"coarse": [2.0, 3.0, 2.5]},
            "sw": {"overlap": 0.5},
            "network_def": NETWORKS[kind],
            "network": "$@network_def.to(@device)",
            "preprocessing": {"_target_": "Compose", "transforms": LOADING + STEPS[kind] + ensure},
            "inferer": INFERER if kind == "segmenter" else {"_target_": "SimpleInferer"},
            **changes,
        }
        text = json.dumps(content) if ending == "json" else yaml.safe_dump(content)
        (folder / "configs" / f"inference.{ending}").write_text(text)
        names = {"0": "healthy", "1": "lesion"} if kind == "classifier" else {"0": "background", "1": "spleen"}
        about = {
            "version": "0.2.1",
            "monai_version": "1.4.0",
            "network_data_format": {
                "inputs": {"image": {"num_channels": 1, "channel_def": {"0": "T1"}}},
                "outputs": {"pred": {"num_channels": 2, "channel_def": names}},
            },
        }
        (folder / "configs" / "metadata.json").write_text(json.dumps(about))
        torch.manual_seed(3)
        torch.save(built(kind).state_dict(), folder / "models" / "model.pt")
        return folder

    return write


def built(kind):
    arguments = {name: value for name, value in NETWORKS[kind].items() if name != "_target_"}
    return known(NETWORKS[kind]["_target_"])(**arguments)


@pytest.fixture
def config(tmp_path):
    """A function that writes a config of volsal's about a bundle."""

    def write(folder, **sections):
        path = tmp_path / "config.yaml"
        model = {"bundle": folder.name, **sections.pop("model", {})}
        path.write_text(yaml.safe_dump({"model": model, "methods": ["input-gradient"], **sections}))
        return path

    return write


def monais(folder, ending):
    """The bundle's parts as MONAI's own parser makes them."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / f"inference.{ending}"))
    parser["device"] = "$torch.device('cpu')"
    network, preprocessing, inferer = map(parser.get_parsed_content, ("network", "preprocessing", "inferer"))
    network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    return SimpleNamespace(network=network.eval(), preprocessing=preprocessing, inferer=inferer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "ending"), [("classifier", "json"), ("segmenter", "yaml")])
def test_a_bundle_answers_as_monais_own_inference_does(kind, ending, bundle, config, scan_file):
    folder, scan = bundle(kind, ending), scan_file()
    theirs = monais(folder, ending)
    image = theirs.preprocessing({"image": str(scan)})["image"]
    with torch.no_grad():
        expected = theirs.inferer(image[None].as_tensor(), theirs.network)
    explainer = Explainer.from_config(load_config(config(folder)))
    ready = explainer.prepare(scan)
    tensor = ready.model_input.tensor
    assert np.abs(ready.model_input.grid.affine - image.affine.numpy()).max() < 1e-5
    torch.testing.assert_close(tensor[0], image.as_tensor(), rtol=0, atol=2e-4)
    network = explainer.model if explainer.windows is None else Windowed(explainer.model, explainer.windows)
    with torch.no_grad():
        torch.testing.assert_close(network(image[None].as_tensor()), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network(tensor), expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.01


def test_the_image_is_what_the_preprocessing_names_first_and_a_labels_steps_are_left_out(bundle):
    steps = [
        {"_target_": "LoadImaged", "keys": ["img", "seg"]},
        {"_target_": "Flipd", "keys": "img", "spatial_axis": 1},
        {"_target_": "Flipd", "keys": "seg", "spatial_axis": 2},
        {"_target_": "Resized", "keys": ["seg", "img"], "spatial_size": [8, 8, 8], "mode": ["nearest", "trilinear"]},
    ]
    flip, resize = load_bundle(bundle(preprocessing=steps)).preprocess
    assert flip.spatial_axis == 1
    assert str(resize.mode).rpartition(".")[2].lower() == "trilinear"
    plain = [{"_target_": "Flip", "spatial_axis": 0}, {"_target_": "monai.transforms.ScaleIntensity"}]
    found = load_bundle(bundle(preprocessing=plain)).preprocess
    assert [type(step).__name__ for step in found] == ["Flip", "ScaleIntensity"]


def test_names_windows_and_version_come_from_the_bundle(bundle):
    found = load_bundle(bundle("segmenter"))
    assert found.windows == Windows((12, 12, 12), 0.5, "gaussian", 0.125, 2, "replicate", 0.0)
    assert found.classes == ("background", "spleen")
    assert found.channels == ("T1",)
    assert (found.name, found.version, found.ran) == ("a bundle", "0.2.1", ())
    assert load_bundle(bundle()).windows is None


def test_the_configs_own_parts_go_before_the_bundles(bundle, config, tmp_path):
    folder = bundle("segmenter", inferer={"_target_": "SliceInferer"}, preprocessing="$anything()")
    other = {name: tensor + 1 for name, tensor in built("segmenter").state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    sections = {
        "preprocess": [{"ScaleIntensity": None}],
        "windows": {"size": [8, 8, 8]},
        "model": {"classes": ["a", "b"], "weights": "other.safetensors"},
    }
    explainer = Explainer.from_config(load_config(config(folder, **sections)))
    assert repr(explainer.preprocess) == "ScaleIntensity"
    assert explainer.windows == Windows((8, 8, 8))
    assert explainer.classes == ("a", "b")
    state = explainer.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in other.items())
    none = load_config(config(folder, preprocess=[], windows=None))
    assert Explainer.from_config(none).windows is None


def test_a_target_may_be_named_as_the_bundle_names_it(bundle, config, scan_file):
    explainer = Explainer.from_config(load_config(config(bundle(), targets=["lesion"])))
    explanation = explainer(scan_file())
    assert explanation.maps[0].target == "class-1"
    assert explanation.prediction.name in ("healthy", "lesion")
    assert explanation.provenance["model"]["bundle"]["name"] == "a bundle"


def test_a_segmenter_is_explained_window_by_window_from_the_command_line(bundle, config, scan_file, tmp_path):
    path = config(bundle("segmenter", "yaml"), targets=["segment-spleen"], methods=["grad-cam"], alignment="half-pixel")
    done = invoke("explain", scan_file(), "-c", path, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "scan" / "case.json").read_text())
    assert record["provenance"]["model"]["windows"]["size"] == [12, 12, 12]
    assert record["provenance"]["model"]["bundle"]["ran"] == []
    assert record["maps"][0]["target"] == "segment-1"


# What a bundle must not get to do


def hostile(canary):
    """Changes to a bundle's config, each of which would make the file ``canary``; and what is told of it."""
    touch = f"touch '{canary}'"
    opens = f"$open('{canary}', 'w')"

    def and_then(value):
        return f"$(open('{canary}', 'w'), {value})[1]"

    network = NETWORKS["classifier"]
    shell = {"_target_": "os.system", "command": touch}
    step = {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x"}
    spacing = {"_target_": "Spacingd", "keys": "image", "pixdim": and_then("2.0")}
    walk = {"_target_": "monai.bundle.utils.os.system", "command": touch}
    return {
        "an expression for the network": ({"network": opens}, "network: $open("),
        "an expression behind a reference": ({"network": "@other", "other": opens}, "other: $open("),
        "more than putting on a device": (
            {"network": f"$@network_def.to({and_then('@device')[1:]})"},
            "network: $@network_def.to((open(",
        ),
        "a function for the network": ({"network_def": shell}, "network_def: os.system"),
        "an argument": (
            {"network_def": {**network, "out_channels": and_then(2)}},
            "network_def::out_channels: $(open(",
        ),
        "a part of an argument": (
            {"network_def": {**network, "act": ["relu", {"inplace": shell}]}},
            "network_def::act::1::inplace: os.system",
        ),
        "an attribute of a module": ({"network_def": walk}, "network_def: monai.bundle.utils.os.system"),
        "what must come before": ({"network_def": {**network, "_requires_": opens}}, "network_def::_requires_: $open("),
        "whether it is there": (
            {"network_def": {**network, "_disabled_": f"$not open('{canary}', 'w')"}},
            "network_def::_disabled_: $not",
        ),
        "an expression for the steps": ({"preprocessing": f"$[open('{canary}', 'w')][:0]"}, "preprocessing: $[open("),
        "a function among the steps": ({"preprocessing": [shell]}, "preprocessing::0: os.system"),
        "a step of its own": ({"preprocessing": [{**step, "keys": and_then("'image'")}]}, "preprocessing::0: Lambdad"),
        "a step's argument": ({"preprocessing": [spacing]}, "preprocessing::0::pixdim: $(open("),
        "the inferer": ({"inferer": {**INFERER, "overlap": and_then(0.5)}}, "inferer::overlap: $(open("),
    }


TRICKS = list(hostile("x"))


@pytest.mark.parametrize("trick", TRICKS)
def test_what_a_bundle_would_run_is_told_and_not_run(trick, bundle, tmp_path):
    changes, says = hostile(tmp_path / "canary")[trick]
    folder = bundle(**changes)
    with pytest.raises(ModelError, match="would run what is not plainly MONAI's") as raised:
        load_bundle(folder)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert any(says in line for line in would_run(folder))
    assert not (tmp_path / "canary").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trick", TRICKS)
def test_the_same_runs_where_the_bundle_is_trusted(trick, bundle, tmp_path, capfd):
    """So that the test above cannot pass for tricks that are none."""
    changes, _ = hostile(tmp_path / "canary")[trick]
    with suppress(VolsalError):  # what then is no network, or no sequence of steps
        load_bundle(bundle(**changes), trust=True)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "statement",
    ["$import scripts", "$from scripts import x", "$#\nimport scripts", "$\\\nimport scripts", "$from.a import b"],
)
def test_imports_are_told_however_they_are_written_and_where(statement, bundle):
    from monai.bundle.config_item import ConfigExpression

    assert ConfigExpression.is_import_statement(statement)
    assert any(line.startswith("deep::0::a: $") for line in would_run(bundle(network="$f()", deep=[{"a": statement}])))
    many = would_run(bundle(network="$f()", imports=[0] * 20_000 + [statement]))
    assert many[-1] == "import statements, if any, beyond the first 20,000 values of inference.json"


HARMLESS_LOOKING = {
    "monai.networks.nets.resnet.torch.hub.load": "is no network",
    "monai.networks.nets.UNet.load_state_dict": "is no network",
    "monai.apps.utils.download_url": "fetches",
    "monai.bundle.run": "runs another config",
    "monai.bundle.ConfigParser": "evaluates",
    "monai.transforms.Lambda": "is no network",
    "monai.networks.nets.MILModel": "takes what torchvision has by name",
    "monai.networks.nets.Transchex": "fetches",
    "monai.networks.blocks.TextEncoder": "fetches",
    "monai.networks.blocks.FCN": "fetches",
    "torch.load": "unpickles",
    "torch.jit.load": "runs a program",
    "torch.hub.load": "fetches and runs",
    "torch.nn.modules.module.torch": "a module",
    "torch.nn.utils.prune.identity": "no layer",
    "builtins.eval": "evaluates",
    "subprocess.run": "runs",
    "": "is nothing",
}


@pytest.mark.parametrize("target", HARMLESS_LOOKING)
def test_only_networks_blocks_and_layers_are_built(target, bundle):
    assert known(target) is None
    assert would_run(bundle(network_def={"_target_": target}))


@pytest.mark.parametrize(
    "target",
    ["UNet", "Unet", "monai.networks.nets.UNet", "monai.networks.nets.unet.UNet", "resnet18", "Convolution",
     "monai.networks.blocks.Convolution", "torch.nn.Conv3d", "torch.nn.modules.conv.Conv3d"],
)  # fmt: skip
def test_a_network_has_several_true_names(target):
    assert known(target).__name__ == target.rpartition(".")[2].replace("Unet", "UNet")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preprocessing": [{"_target_": "monai.transforms.os.system", "command": ""}]}, "monai.transforms.os.system"),
        ({"preprocessing": [{"_target_": "RandFlipd", "keys": "image"}]}, "preprocessing::0: RandFlipd"),
        ({"preprocessing": [{"_target_": "Transposed", "keys": "image", "indices": [0, 2, 1]}]}, "Transposed"),
        ({"preprocessing": [{"_target_": "LoadImaged", "keys": "image", "reader": "NumpyReader"}]}, "with reader"),
        ({"preprocessing": [{"_target_": "EnsureTyped", "keys": "image", "dtype": "float16"}]}, "with dtype"),
        ({"preprocessing": [{"_target_": "Flipd", "keys": "image", "spatial_axis": 0, "lazy": True}]}, "with lazy"),
        ({"preprocessing": [{"_target_": "CropForegroundd", "keys": "image", "source_key": "label"}]}, "source_key"),
        ({"preprocessing": {"_target_": "Compose", "transforms": [], "lazy": True}}, "Compose with lazy"),
        ({"inferer": {"_target_": "SliceInferer", "roi_size": [8, 8]}}, "inferer: SliceInferer"),
        ({"network_def": {"_target_": "resnet18", "pretrained": True}}, "network_def::pretrained: resnet18 fetches"),
        ({"network_def": {"_target_": "EfficientNetBN", "model_name": "efficientnet-b0"}}, "EfficientNetBN fetches"),
        ({"network_def": {**NETWORKS["classifier"], "out_channels": "%../../secret.json::key"}}, "%../../secret.json"),
        ({"network_def": {**NETWORKS["classifier"], "_mode_": "debug"}}, "network_def::_mode_: debug"),
        ({"network_def": "%configs/train.json::network_def"}, "%configs/train.json"),
    ],
)  # fmt: skip
def test_what_volsal_does_not_carry_exactly_is_told_by_its_place(changes, says, bundle):
    told = would_run(bundle(**changes))
    assert any(says in line for line in told), told


def test_the_refusal_says_what_may_be_written_instead(bundle):
    with pytest.raises(ModelError, match=r"--trust-bundle.*or give 'preprocess:' in the config"):
        load_bundle(bundle(preprocessing="$f()"))
    with pytest.raises(ModelError) as raised:
        load_bundle(bundle(network="$f()"))
    assert "or give" not in str(raised.value)


def inference(folder):
    return folder / "configs" / "inference.json"


def changed(**changes):
    """A damage: these keys of the config are others, or none."""

    def change(folder):
        content = json.loads(inference(folder).read_text()) | changes
        inference(folder).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def other_text(text, ending="json"):
    def change(folder):
        inference(folder).unlink()
        inference(folder).with_suffix(f".{ending}").write_text(text)

    return change


def moved_out(name):
    """A damage: the file is a link to one beside the bundle."""

    def change(folder):
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return change


def renamed(name, other):
    return lambda folder: (folder / name).rename(folder / other)


def weights_of(content):
    return lambda folder: (folder / "models" / "model.pt").write_bytes(content(folder))


def pickled(folder):
    return pickle.dumps(Bomb(folder.parent / "canary"))


LAUGHS = "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
OTHER_ARGUMENTS = NETWORKS["classifier"] | {"img_size": 96}
DAMAGES = [
    (shutil.rmtree, "a bundle: no such folder"),
    (renamed("configs/inference.json", "configs/train.json"), "has no configs/inference.json or inference.yaml"),
    (renamed("configs/metadata.json", "configs/meta.json"), "has no configs/metadata.json"),
    (renamed("models/model.pt", "models/best.pt"), "no models/model.safetensors or model.pt (models holds best.pt)"),
    (renamed("models", "weights"), "(models is not there)"),
    (other_text("{"), "inference.json: cannot be read: Expecting property name"),
    (other_text("[]"), "holds a list, not a mapping"),
    (other_text("[" * 100_000), "inference.json: cannot be read"),
    (other_text("a: !!python/object/apply:os.system ['true']", "yaml"), "cannot be read: could not determine a constr"),
    (other_text(f"{LAUGHS}\nnetwork: '@a11'", "yaml"), "describes more than 20,000 values"),
    (changed(network="@a", a="@b", b="@a"), "@a refers to itself"),
    (changed(network="@a", a={"_target_": "UNet", "channels": ["@a"]}), "@a refers to itself"),
    (changed(preprocessing="@a", a="@b", b="@a"), "@a refers to itself"),
    (other_text("a: &a [*a]\nnetwork: '@a'", "yaml"), "nested too deeply"),
    (other_text("a: &a [*a]\npreprocessing: []\nnetwork: $f()", "yaml"), "nested too deeply"),
    (changed(network="@gone::0"), "refers to @gone::0, which is not in it"),
    (changed(network="@preprocessing::transforms::" + "9" * 5000), "9…, which is not in it"),
    (changed(**{"+preprocessing": {"transforms": []}}), "its key '+preprocessing' changes another part"),
    (changed(**{"preprocessing::transforms::2::axcodes": "LPS"}), "its key 'preprocessing::transforms::2::axcodes' ch"),
    (changed(**{"network_def#act": "prelu"}), "its key 'network_def#act' changes another part"),
    (other_text("a: !!int ''", "yaml"), "inference.yaml: cannot be read"),
    (other_text("a: !!bool x", "yaml"), "inference.yaml: cannot be read"),
    (other_text("a: !!timestamp x", "yaml"), "inference.yaml: cannot be read"),
    (other_text(f"a: !!float {'9:' * 200}9", "yaml"), "inference.yaml: cannot be read"),
    (changed(inferer={"roi_size": [8, 8, 8]}), "inferer: a dict"),
    (changed(network=None, network_def=None), "describes no 'network' or 'network_def'"),
    (changed(preprocessing=None), "describes no 'preprocessing'; write 'preprocess:'"),
    (changed(network_def=OTHER_ARGUMENTS), "DenseNet refuses its arguments: TypeError: "),
    (changed(network=3), "its network is a int"),
    (changed(inferer=INFERER | {"overlap": 1.5}), "inferer: windows.overlap is a share of the window in [0, 1)"),
    (changed(preprocessing=[{"_target_": "BorderPadd", "keys": "image"}]), "BorderPad refuses its arguments"),
    (changed(preprocessing=[{"_target_": "BorderPadd", "keys": 3}]), "BorderPad refuses its arguments"),
    (changed(preprocessing={"_target_": "Compose", "transforms": "@preprocessing"}), "nested too deeply"),
    (other_text(f"{LAUGHS}\nnetwork_def: 3\npreprocessing: '@a11'", "yaml"), "describes more than 20,000 values"),
    (moved_out("configs/inference.json"), "a link that leads out of the bundle"),
    (moved_out("models/model.pt"), "a link that leads out of the bundle"),
    (weights_of(lambda folder: b"<html>"), "not a sound weights file"),
    (weights_of(pickled), "holds more than tensors"),
]


@pytest.mark.filterwarnings("ignore")
def test_monai_does_change_a_part_by_such_a_key(bundle):
    """So that refusing it is no fuss about nothing."""
    flip = {"_target_": "Flipd", "keys": "image"}
    changes = {"preprocessing::transforms::2::axcodes": "LPS", "+preprocessing#transforms": [flip]}
    steps = monais(bundle(**changes), "json").preprocessing.transforms
    assert steps[2].ornt_transform.axcodes == "LPS"
    assert type(steps[-1]).__name__ == "Flipd"


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_a_damaged_bundle_is_refused_in_one_line(number, bundle, tmp_path):
    damage, says = DAMAGES[number]
    folder = bundle()
    damage(folder)
    with pytest.raises(VolsalError) as raised:
        load_bundle(folder)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "canary").exists()
    with suppress(VolsalError):  # what is not of the config is not looked at, and all else is in one line here too
        would_run(folder)


def test_a_networks_error_names_the_versions(bundle):
    folder = bundle(network_def=OTHER_ARGUMENTS)
    with pytest.raises(ModelError, match=r"img_size.*made for MONAI 1.4.0, this is "):
        load_bundle(folder)


@pytest.mark.parametrize("names", [None, {"0": "a"}, {"0": "a", "1": "a"}, {"0": "a", "2": "b"}, ["a", "b"]])
def test_names_that_do_not_name_each_channel_are_left_out(names, bundle):
    folder = bundle()
    about = json.loads((folder / "configs" / "metadata.json").read_text())
    about["network_data_format"]["outputs"]["pred"]["channel_def"] = names
    (folder / "configs" / "metadata.json").write_text(json.dumps(about))
    assert load_bundle(folder).classes == (("a",) if names == {"0": "a"} else ())


def test_a_config_names_one_source_of_its_model(config, bundle):
    for model in ({"factory": "a:b"}, {"arguments": {"a": 1}}):
        with pytest.raises(ConfigError, match=r"give one of|drop 'arguments'"):
            load_config(config(bundle(), model=model))


# Trusted


@pytest.fixture
def own_code(bundle):
    """A bundle whose network and one of whose steps are its own."""
    step = {"_target_": "scripts.own.Doubled", "keys": "image"}
    folder = bundle(
        network_def={"_target_": "scripts.own.make", "width": 3},
        preprocessing={"_target_": "Compose", "transforms": LOADING + STEPS["classifier"] + [step]},
        name="own code",
    )
    (folder / "scripts").mkdir()
    (folder / "scripts" / "__init__.py").touch()
    (folder / "scripts" / "own.py").write_text(
        "import torch\n"
        "from monai.transforms import MapTransform\n"
        "class Doubled(MapTransform):\n"
        "    def __call__(self, data):\n"
        "        return {**data, **{key: data[key] * 2 for key in self.keys}}\n"
        "def make(width):\n"
        "    return torch.nn.Sequential(torch.nn.Conv3d(1, width, 3, stride=2), torch.nn.ReLU(),\n"
        "                               torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten(), torch.nn.Linear(width, 2))\n"
    )
    torch.manual_seed(1)
    twin = nn.Sequential(
        nn.Conv3d(1, 3, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    torch.save(twin.state_dict(), folder / "models" / "model.pt")
    return folder, twin.eval()


@pytest.fixture
def clean_imports(monkeypatch):
    """Bundles share the name of their package of code; each test has its own."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "scripts":
            del sys.modules[name]


def test_a_trusted_bundles_own_code_makes_the_answer(own_code, config, scan_file, clean_imports):
    folder, twin = own_code
    settings = load_config(config(folder))
    with pytest.raises(ModelError, match=r"scripts\.own\.make; preprocessing::transforms::6: scripts\.own\.Doubled"):
        Explainer.from_config(settings)
    explainer = Explainer.from_config(settings, trust_bundle=True)
    plain = Explainer.from_config(load_config(config(folder, preprocess=[
        {"Orientation": {"axcodes": "RAS"}}, {"Spacing": {"pixdim": [2.0, 3.0, 2.5]}}, {"ScaleIntensity": None},
        {"ResizeWithPadOrCrop": {"spatial_size": [16, 12, 10]}},
    ])), trust_bundle=True)  # fmt: skip
    scan = read_scan(scan_file())
    seen = explainer.model_input(scan)
    torch.testing.assert_close(seen, plain.model_input(scan) * 2, rtol=0, atol=2e-4)
    explanation = explainer(scan)
    with torch.no_grad():
        assert explanation.prediction.logits == pytest.approx(twin(seen)[0].tolist(), abs=1e-5)
    recorded = explanation.provenance["model"]["bundle"]
    assert [line for line in recorded["ran"] if "scripts.own.make" in line]
    assert "imports::0: $import glob" in recorded["ran"]


def test_a_trusted_bundle_with_a_random_step_is_refused(own_code, clean_imports):
    folder, _ = own_code
    path = folder / "configs" / "inference.json"
    content = json.loads(path.read_text())
    content["preprocessing"]["transforms"].append({"_target_": "RandFlipd", "keys": "image", "prob": 0.5})
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="RandFlipd is random"):
        load_bundle(folder, trust=True)


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_prints_what_it_trusts_and_both_records_hold_it(
    own_code, config, scan_file, tmp_path, clean_imports
):
    folder, _ = own_code
    scan = scan_file("scans/one.nii.gz")
    path = config(folder, scans={"folder": "scans"}, output="out")
    refused = invoke("explain", scan, "-c", path, "-o", tmp_path / "one")
    assert refused.exit_code == 2
    assert "would run what is not plainly MONAI's" in refused.output
    assert "scripts.own" not in sys.modules
    for words in (("explain", scan, "-c", path, "-o", tmp_path / "one"), ("run", path)):
        done = invoke(*words, "--trust-bundle")
        assert done.exit_code == 0, done.output
        assert "is trusted; of its own it runs:" in done.output
        assert "network_def: scripts.own.make" in done.output
    case = json.loads((tmp_path / "out" / "one" / "case.json").read_text())
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert case["provenance"]["model"]["bundle"] == run["bundle"]
    assert "network_def: scripts.own.make" in run["bundle"]["ran"]


def test_trust_without_a_bundle_is_a_mistake_and_needless_trust_is_said(bundle, config, scan_file, tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: {factory: 'torch.nn:Conv3d'}")
    assert "names no bundle" in invoke("layers", "-c", plain, "--trust-bundle").output
    listed = invoke("layers", "-c", config(bundle()), scan_file(), "--trust-bundle")
    assert listed.exit_code == 0
    assert "nothing in the bundle needs trust" in listed.output


@pytest.mark.slow
def test_worker_processes_have_the_users_consent_too(own_code, config, scan_file, clean_imports):
    folder, _ = own_code
    for name in ("one", "two"):
        scan_file(f"scans/{name}.nii.gz")
    settings = load_config(config(folder, scans={"folder": "scans"}, output="out"))
    states = [o.status for o in Run(settings, workers=2, trust_bundle=True).execute()]
    assert states == ["done", "done"]


# Runs


def statuses(path):
    return [outcome.status for outcome in Run(load_config(path)).execute()]


def test_a_run_is_kept_where_the_bundle_moved_and_made_anew_where_it_changed(bundle, config, scan_file):
    folder = bundle()
    scan_file("scans/one.nii.gz")
    sections = {"scans": {"folder": "scans"}, "output": "out"}
    path = config(folder, **sections)
    assert statuses(path) == ["done"]
    assert statuses(path) == ["kept"]
    folder = folder.rename(folder.with_name("moved"))
    path = config(folder, **sections)
    assert statuses(path) == ["kept"]
    inference, metadata = folder / "configs" / "inference.json", folder / "configs" / "metadata.json"
    for file, old, new in ((inference, '"RAS"', '"LPS"'), (metadata, "lesion", "tumour")):
        file.write_text(file.read_text().replace(old, new))
        assert statuses(path) == ["done"]
    weights = folder / "models" / "model.pt"
    state = torch.load(weights, weights_only=True)
    next(iter(state.values())).mul_(1.01)
    torch.save(state, weights)
    assert statuses(path) == ["done"]
    assert statuses(path) == ["kept"]
