import json
import re

import pytest

from volsal.config import ConfigError, load_config, require_file, require_files

GOOD = """
model:
  factory: torch.nn:Conv3d
  arguments: {in_channels: 1, out_channels: 2, kernel_size: 1, eps: 1e-3}
  classes: [no, yes]
preprocess:
  - Orientation: {axcodes: RAS}
  - NormalizeIntensity
methods:
  - grad-cam: {layer: layer3}
  - guided-backprop
targets: [predicted-class, 1]
scans: {folder: scans}
output: out
"""


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return write


def test_reads_what_is_meant(config, tmp_path):
    read = load_config(config(GOOD))
    assert read.model.arguments["eps"] == 1e-3  # YAML 1.1 would make it text
    assert read.model.classes == ["no", "yes"]  # and these false and true
    assert read.methods == [{"grad-cam": {"layer": "layer3"}}, "guided-backprop"]
    assert read.targets == ["predicted-class", 1]
    assert read.folder == tmp_path


def test_a_function_for_preprocessing(config):
    assert load_config(config("model: {factory: a:b}\npreprocess: {function: f.py:g}")).preprocess.function == "f.py:g"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("classes", "clases"), "c.yaml:5: model.clases: unknown key; did you mean 'classes'?"),
        (GOOD.replace("methods:", "method:"), "c.yaml:9: method: unknown key; did you mean 'methods'?"),
        (
            GOOD.replace("scans: {folder", "scans: {foldr"),
            "c.yaml:13: scans.foldr: unknown key; did you mean 'folder'?",
        ),
        (
            GOOD.replace("  factory: torch.nn:Conv3d\n", ""),
            "c.yaml:2: model: give one of 'factory', 'file' (a .pt2) and 'bundle'",
        ),
        (
            GOOD.replace("folder: scans", "folder: a, volume: -1"),
            "c.yaml:13: scans.volume: expected a number from 0, or all",
        ),
        (GOOD.replace("folder: scans", "folder: a, nan: .inf"), "c.yaml:13: scans.nan: input should be a"),
        (GOOD + "threads: none\n", "c.yaml:15: threads: input should be a valid integer"),
        (GOOD + "targets: [1]\n", "c.yaml:15: targets: given twice (first in line 12)"),
        (
            GOOD.replace("targets: [predicted-class, 1]", "targets: []"),
            "c.yaml:12: targets: list should have at least 1 item",
        ),
        (GOOD.replace("model:", "model"), "not valid YAML"),
        ("", "a config is a mapping with the keys model, preprocess"),
        ("preprocess: []", "c.yaml: model: missing"),
        (
            "model: {factory: a:b}\npreprocess: {functoin: x}",
            "c.yaml:2: preprocess.functoin: unknown key; did you mean 'function'",
        ),
    ],
)
def test_names_file_line_key_and_the_nearest_valid_key(config, text, says):
    with pytest.raises(ConfigError) as raised:
        load_config(config(text))
    assert says in str(raised.value)


def test_all_mistakes_are_told_at_once(config):
    text = GOOD.replace("classes", "clases").replace("output", "outpt")
    with pytest.raises(ConfigError) as raised:
        load_config(config(text))
    assert len(str(raised.value).splitlines()) == 2


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("key", ["model.file", "model.bundle", "scans.bids", "scans.table", "audit.template"])
def test_a_file_that_is_not_there_is_told_as_written_and_as_found(tmp_path, monkeypatch, key):
    section, setting = key.split(".")
    content = {"model": {"factory": "a:b"}, "scans": {"folder": "."}, section: {setting: "deep/gone.x"}}
    (tmp_path / "c.yaml").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    config = load_config("c.yaml")
    require_files(config, *({"model", "scans", "audit", "preprocess"} - {section}))
    with pytest.raises(ConfigError) as raised:
        require_files(config, section)
    what = {"file": "exported program", "bids": "folder"}.get(setting, "scan" if section == "audit" else setting)
    assert str(raised.value) == (
        f"c.yaml: {key}: no {what} {tmp_path}/deep/gone.x; put it there, or mend the path 'deep/gone.x', which starts "
        "from the config's own folder"
    )


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("a.nii", None),
        ("{case}.nii", None),
        ("sub", None),
        ("*.nii", None),
        ("sub/{case}/mask.nii", None),
        ("*.mha", "*.mha"),
        ("gone/{case}.nii", "gone"),
        ("gone/*.nii", "gone"),
        ("x" * 300, "x" * 300),
    ],
)
def test_of_a_path_that_varies_what_does_not_must_be_there(config, tmp_path, name, missing):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.nii").touch()
    read = load_config(config(GOOD))
    if missing is None:
        require_file(read, "key", name, "scan")
        return
    what = "folder" if missing == "gone" else "scan"
    with pytest.raises(ConfigError, match=re.escape(f"c.yaml: key: no {what} {tmp_path / missing}; ")):
        require_file(read, "key", name, "scan")


def test_channels_can_be_kept_apart(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {factory: net.py:Net}\nper_channel: true\n")
    assert load_config(path).per_channel
    path.write_text("model: {factory: net.py:Net}\nper_chanel: true\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:2: per_chanel: unknown key; did you mean 'per_channel'"):
        load_config(path)
