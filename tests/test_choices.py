import pytest

from volsal import GradCAM, HiResCAM, IntegratedGradients, SmoothGrad
from volsal.attribution.settings import SettingError
from volsal.choices import UnknownMethodError, configured_methods, method_names


@pytest.mark.parametrize(
    ("methods", "names"),
    [
        ([GradCAM("layer3")], ["grad-cam"]),
        ([GradCAM(), HiResCAM()], ["grad-cam", "hires-cam"]),
        ([GradCAM(), GradCAM("Layer3.conv1"), HiResCAM()], ["grad-cam", "grad-cam-layer3.conv1", "hires-cam"]),
        (
            [SmoothGrad(samples=20), SmoothGrad(samples=20, seed=1), SmoothGrad()],
            ["smooth-grad-samples-20-seed-0", "smooth-grad-samples-20-seed-1", "smooth-grad-samples-50-seed-0"],
        ),
        (
            [IntegratedGradients("zero"), IntegratedGradients("controls/Healthy 1.nii.gz")],
            ["integrated-gradients-zero", "integrated-gradients-healthy-1.nii.gz"],
        ),
    ],
)
def test_a_method_is_called_by_its_id_and_by_what_sets_it_apart_from_its_kin(methods, names):
    assert method_names(methods) == names


def test_a_config_may_name_a_method():
    found = configured_methods([{"grad-cam": {"layer": "layer3", "name": "deep"}}, {"grad-cam": {"layer": "layer2"}}])
    assert found == {"deep": GradCAM("layer3"), "grad-cam-layer2": GradCAM("layer2")}


@pytest.mark.parametrize(
    ("entries", "error", "says"),
    [
        (["grad-cam", "grad-cam"], SettingError, "each once; got grad-cam, grad-cam"),
        ([], SettingError, "got none"),
        ([{"grad-cam": {"name": "a/b"}}], SettingError, "not 'a/b'"),
        ([{"grad-cam": {"name": "x"}}, {"hires-cam": {"name": "x"}}], SettingError, "two methods would be called 'x'"),
        ([{"grad-cam": {"layr": "x"}}], UnknownMethodError, "no setting 'layr'; did you mean 'layer'"),
        ([{"grad-cam": {}, "hires-cam": {}}], UnknownMethodError, "one id with its settings"),
    ],
)
def test_refuses_in_words(entries, error, says):
    with pytest.raises(error, match=says):
        configured_methods(entries)
