import io
import json
import pickle
import zipfile

import pytest
import torch
from nets import Bomb, random_net
from torch.testing import assert_close

from volsal import ClassLogit, GradCAM, GuidedBackprop, list_layers, load_model
from volsal.attribution import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.export warns about itself


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    net = random_net().float().eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(net, (torch.randn(2, 1, 7, 9, 11),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path, net


def test_an_exported_program_keeps_its_layers_names_and_its_maps(archive):
    path, net = archive
    model, volume = load_model(path), torch.randn(3, 1, 7, 9, 11)
    assert [layer.name for layer in list_layers(model, volume)][:4] == ["0", "1", "2", "3"]
    for method in (GradCAM("4"), GuidedBackprop()):
        assert_close(method(model, volume, ClassLogit(1)), method(net, volume, ClassLogit(1)))
    assert GuidedBackprop().attribute(model, volume, [ClassLogit(1)]).coverage == {"relu": 2}


def rewritten(path, tmp_path, change):
    """The archive with its members passed through ``change(name, bytes) -> bytes or None``; extra members as a dict."""
    out = tmp_path / "changed.pt2"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        root = source.namelist()[0].partition("/")[0]
        for name in source.namelist():
            content = change(name.partition("/")[2], source.read(name))
            if content is not None:
                target.writestr(name, content)
        for name, content in getattr(change, "extra", {}).items():
            target.writestr(f"{root}/{name}", content)
    return out


def edit(member, old, new):
    return lambda name, content: content.replace(old, new) if name == member else content


def adding(**members):
    def change(name, content):
        return content

    change.extra = {name.replace("__", "/").replace("_dot_", "."): content for name, content in members.items()}
    return change


def pickled(bomb):
    buffer = io.BytesIO()
    torch.save(bomb, buffer)
    return buffer.getvalue()


MODEL = "models/model.json"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit(MODEL, b"torch.ops.aten.relu_.default", b"torch.hub.load"), "calls torch.hub.load"),
        (
            edit(MODEL, b"torch.ops.aten.relu_.default", b"torch.ops.aten.from_file.default"),
            "calls torch.ops.aten.from_file",
        ),
        (edit(MODEL, b"torch.ops.aten.relu_.default", b"_operator.attrgetter"), "calls _operator.attrgetter"),
        (edit(MODEL, b"Symbol('", b"open('"), "holds code where sizes belong"),
        (
            edit(MODEL, b'"guards_code": []', b'"guards_code": ["__import__(\'os\').getcwd()"]'),
            "holds code where sizes belong",
        ),
        (
            edit(MODEL, b'\\"builtins.tuple\\"', b'\\"collections.defaultdict\\"'),
            "takes or returns a collections.defaultdict",
        ),
        (adding(models__model_dot_JSON=b"{}"), "unknown part, 'models/model.JSON'"),
        (adding(data__constants__OPAQUE_obj_0=b"x"), "holds a pickled object"),
        (adding(extra__readme_dot_txt=b"x"), "unknown part"),
        (adding(data__aotinductor__model__x_dot_so=b"\x7fELF"), "holds compiled machine code"),
        (adding(data__constants__opaque_obj_0=pickle.dumps(3)), "holds a pickled object"),
        (adding(data__constants__custom_obj_0=b"x"), "holds a pickled object"),
        (
            lambda name, content: None if name == "archive_format" else content,
            "not a current exported",
        ),
    ],
)
def test_an_archive_that_could_act_is_refused(archive, tmp_path, change, says):
    changed = rewritten(archive[0], tmp_path, change)
    assert changed.read_bytes() != archive[0].read_bytes()
    with pytest.raises(ModelError, match=says):
        load_model(changed)


@pytest.mark.parametrize("member", ["data/sample_inputs/model.pt", "data/weights/weight_0"])
def test_a_pickle_inside_is_refused_and_never_run(archive, tmp_path, member):
    canary = tmp_path / "canary"

    def change(name, content):
        if name == "data/weights/model_weights_config.json" and "weight" in member:
            config = json.loads(content)
            next(iter(config["config"].values()))["use_pickle"] = True
            return json.dumps(config).encode()
        return pickled(Bomb(canary)) if name == member else content

    with pytest.raises(ModelError):
        load_model(rewritten(archive[0], tmp_path, change))
    assert not canary.exists()


def test_a_part_beside_the_programs_own_folder_is_refused(archive, tmp_path):
    path = tmp_path / "two.pt2"
    path.write_bytes(archive[0].read_bytes())
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(ModelError, match="holds more than one program"):
        load_model(path)


def test_a_payload_named_by_the_config_is_refused_whatever_it_says_of_itself(archive, tmp_path):
    def change(name, content):
        if name != "data/constants/model_constants_config.json":
            return content
        return json.dumps({"config": {"c": {"path_name": "opaque_obj_0", "use_pickle": False}}}).encode()

    with pytest.raises(ModelError, match="holds a pickled object"):
        load_model(rewritten(archive[0], tmp_path, change))


def test_a_program_with_sizes_left_open_is_let_in(tmp_path):
    sizes = dict.fromkeys((2, 3, 4), torch.export.Dim.DYNAMIC)
    program = torch.export.export(random_net().float().eval(), (torch.randn(1, 1, 7, 9, 11),), dynamic_shapes=(sizes,))
    torch.export.save(program, tmp_path / "open.pt2")
    model = load_model(tmp_path / "open.pt2")
    assert GradCAM("4")(model, torch.randn(1, 1, 12, 13, 14), ClassLogit(0)).shape == (1, 1, 5, 6, 6)


def test_a_damaged_archive_and_a_checkpoint_are_told_apart(archive, tmp_path):
    content = archive[0].read_bytes()
    (tmp_path / "cut.pt2").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="not an exported program"):
        load_model(tmp_path / "cut.pt2")
    torch.save({"a": torch.zeros(1)}, tmp_path / "checkpoint.pt2")
    with pytest.raises(ModelError, match="a TorchScript archive or checkpoint"):
        load_model(tmp_path / "checkpoint.pt2")


def test_a_program_brings_its_own_weights(archive):
    with pytest.raises(ModelError, match="brings its own weights"):
        load_model(archive[0], {"width": 3})
