"""A result whose maps are small integers says everything else of the values before."""

import json

import nibabel as nib
import numpy as np
import pytest
from nets import random_net

from volsal import Explainer, GradCAM, InputGradient
from volsal.config import ConfigError, load_config
from volsal.explanation import CASE_FILE


def test_the_record_is_that_of_the_values_and_states_the_error(scan_file, tmp_path):
    net = random_net().float()
    explanation = Explainer(net, None, [GradCAM("4"), InputGradient()], 1, alignment="half-pixel")(scan_file())
    exact = json.loads((explanation.save(tmp_path / "exact") / CASE_FILE).read_text())
    home = explanation.save(tmp_path / "small", "uint8")
    small = json.loads((home / CASE_FILE).read_text())
    for one, other, heatmap in zip(exact["maps"], small["maps"], explanation.maps, strict=True):
        assert one["stored"] == {"dtype": "float32", "slope": 1.0, "largest_error": 0.0}
        assert other["stored"]["dtype"] == ("int8" if heatmap.values.min() < 0 else "uint8")
        image = nib.load(home / other["file"])
        assert image.get_data_dtype() == other["stored"]["dtype"]
        apart = np.abs(image.get_fdata() - heatmap.values).max()
        assert apart == pytest.approx(other["stored"]["largest_error"], rel=1e-6)
        assert float(image.header["cal_max"]) == np.float32(heatmap.window[1])
        same = set(one) - {"stored", "sha256"}
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
    assert {m["stored"]["dtype"] for m in small["maps"]} == {"uint8", "int8"} or len(small["maps"]) == 2


def test_the_config_names_the_way(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {file: net.pt2}\nmaps: {stored_as: uint16}\n")
    assert load_config(path).maps.stored_as == "uint16"
    path.write_text("model: {file: net.pt2}\n")
    assert load_config(path).maps.stored_as == "float32"
    path.write_text("model: {file: net.pt2}\nmaps: {stored_as: float16}\n")
    with pytest.raises(ConfigError, match=r"config.yaml:2: maps.stored_as: .*(float32|uint8)"):
        load_config(path)
    path.write_text("model: {file: net.pt2}\nmaps: {dtype: uint8}\n")
    with pytest.raises(ConfigError, match=r"config.yaml:2: maps.dtype: unknown key.*stored_as"):
        load_config(path)
