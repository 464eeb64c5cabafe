"""Damaged files at random: a scan that makes sense or a ScanError, at once, and in little memory.  Nothing else."""

import gzip
import time
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volsal.scans import ScanError, read_scan
from volsal.scans.write import map_header, write_map

SECONDS, BYTES = 2.0, 64 << 20
# What a header's field may hold that is worse than noise.
BINARY = [
    np.array(value, dtype).tobytes()
    for dtype in ("<i2", "<i4", "<f4", "<i8", ">i2", ">f4")
    for value in (0, 1, -1, 2, 7, 127)
]
BINARY += [np.array(value, "<f4").tobytes() for value in (np.nan, np.inf, 1e38, 1e-38, -1e38)]
BINARY += [b"\xff" * 8, b"\x7f\xff\xff\xff"]
WORDS = [
    b"nan", b"inf", b"-1", b"0", b"1e308", b"99999", b"9" * 40, b"2147483648", b"none", b"LIST", b"gzip", b"raw",
    b"bzip2", b"double", b"MET_DOUBLE", b"True", b"LOCAL", b"../x", b"%d", b"\n\n", b"\n", b"(", b":",
    b"=", b":=", b"\0", b"\xff",
]  # fmt: skip


def originals(folder):
    """Whole files of every format, by name: the bytes, and how many of them are header."""
    array = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    made = {}
    for kind, name, header in ((nib.Nifti1Image, "one", 352), (nib.Nifti2Image, "two", 544)):
        image = kind(array, np.diag([-2.0, 2, 3, 1]))
        nib.save(image, folder / f"{name}.nii")
        content = (folder / f"{name}.nii").read_bytes()
        made[f"{name}.nii"] = content, header
        made[f"{name}.nii.gz"] = content, header
    image = sitk.GetImageFromArray(array)
    for suffix in ("nrrd", "mha"):
        for packed in (False, True):
            name = f"packed-{packed}.{suffix}"
            sitk.WriteImage(image, str(folder / name), useCompression=packed)
            content = (folder / name).read_bytes()
            made[name] = (
                content,
                len(content) - 240 if not packed else content.find(b"\n\n" if suffix == "nrrd" else b"LOCAL"),
            )
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return Corpus(folder, originals(folder))


class Corpus(tuple):
    """(folder, files), not told in full where a case fails."""

    def __new__(cls, *parts):
        return super().__new__(cls, parts)

    def __repr__(self):
        return "corpus"


damage = st.lists(
    st.one_of(
        st.tuples(
            st.just("write"), st.floats(0, 1), st.one_of(st.sampled_from(BINARY), st.binary(min_size=1, max_size=4))
        ),
        st.tuples(st.just("word"), st.floats(0, 1), st.sampled_from(WORDS)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 9)),
        st.tuples(st.just("anywhere"), st.floats(0, 1), st.binary(min_size=1, max_size=2)),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content, header, changes):
    data = bytearray(content)
    for how, where, what in changes:
        at = int(where * (header - 1)) if how != "anywhere" else int(where * (len(data) - 1))
        if how == "cut":
            del data[at : at + what]
        elif how == "word":  # takes the place of the word that stands there
            end = next((i for i in range(at, min(len(data), at + 30)) if data[i] in b" \n(),"), at)
            data[at:end] = what
        else:
            data[at : at + len(what)] = what
    return bytes(data)


def judge(path):
    """Read ``path``; fail unless the answer is a sound scan or a ScanError of one line, soon and in little memory."""
    held = path.stat().st_size
    started = time.process_time()
    tracemalloc.start()
    scan = None
    try:
        scan = read_scan(path)
    except ScanError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.process_time() - started < SECONDS
        assert peak < BYTES
    if scan is None:
        assert "\n" not in said.replace(str(path), "")
        return None
    assert np.isfinite(scan.grid.affine).all()
    assert np.isfinite(scan.array).all()
    assert scan.array.size <= held * 1100
    return scan


def attack(corpus, name, changes, length, packed_at):
    folder, made = corpus
    content, header = made[name]
    content = damaged(content, header, changes)
    if name.endswith(".gz"):
        content = gzip.compress(content, 1)
        if packed_at is not None:  # the damage is in the compressed stream
            at = int(packed_at * (len(content) - 1))
            content = content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :]
    path = folder / f"case-{name}"
    path.write_bytes(content[: int(length * len(content))] if length < 0.99 else content)
    scan = judge(path)
    if scan is not None:  # what can be read can be written over, on its own grid
        written = folder / "map.nii.gz"
        write_map(written, scan.array, map_header(scan, "x", "y", (0.0, 1.0)))
        assert read_scan(written, form=scan.form if scan.form == "qform" else None).grid.same_as(scan.grid, 0.02)


NAMES = ["one.nii", "one.nii.gz", "two.nii", "two.nii.gz"] + [
    f"packed-{p}.{s}" for s in ("nrrd", "mha") for p in (True, False)
]
arguments = given(
    changes=damage,
    length=st.one_of(st.just(1.0), st.just(1.0), st.floats(0.01, 1)),
    packed_at=st.one_of(st.none(), st.none(), st.floats(0, 1)),
)
few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", NAMES)
@few
@arguments
def test_any_damage_gives_a_scan_or_a_refusal(corpus, name, changes, length, packed_at):
    attack(corpus, name, changes, length, packed_at)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@many
@arguments
def test_much_damage_gives_a_scan_or_a_refusal(corpus, name, changes, length, packed_at):
    attack(corpus, name, changes, length, packed_at)


@pytest.mark.parametrize("name", NAMES)
def test_the_originals_are_sound(corpus, name):
    folder, made = corpus
    path = folder / f"case-{name}"
    path.write_bytes(gzip.compress(made[name][0]) if name.endswith(".gz") else made[name][0])
    assert judge(path) is not None


def bomb(folder, name, header, zeros):
    """``header`` and then so many zeros, deflated without ever holding them."""
    path = folder / name
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(header)
        for _ in range(zeros >> 20):
            file.write(bytes(1 << 20))
    return path


def nifti_header(shape, **fields):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    header.set_sform(np.eye(4), 1)
    header["xyzt_units"], header["magic"], header["vox_offset"] = 2, b"n+1", 352
    for key, value in fields.items():
        header[key] = value
    return header.binaryblock + bytes(4)


@pytest.mark.parametrize(
    ("fields", "shape", "says"),
    [
        ({}, (700, 700, 700), "too large for what it holds: .* set VOLSAL_MAX_VOXELS"),
        ({}, (4, 4, 4), "more than its header describes; its size there is wrong"),
        ({"vox_offset": 3e8}, (4, 4, 4), "vox_offset 3e.* points past the file's end"),
    ],
)
def test_a_gzip_bomb_is_refused_before_it_unfolds(fields, shape, says, tmp_path):
    path = bomb(tmp_path, "a.nii.gz", nifti_header(shape, **fields), 345 << 20)
    tracemalloc.start()
    with pytest.raises(ScanError, match=says):
        read_scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < BYTES


def test_the_limit_on_voxels_is_stated_and_can_be_set(scan_file, monkeypatch):
    path = scan_file(shape=(4, 5, 6))
    monkeypatch.setenv("VOLSAL_MAX_VOXELS", "119")
    with pytest.raises(ScanError, match="too large: 120 voxels, where volsal reads up to 119; set VOLSAL_MAX_VOXELS"):
        read_scan(path)
    monkeypatch.setenv("VOLSAL_MAX_VOXELS", "2e9")
    assert read_scan(path).array.size == 120
    monkeypatch.setenv("VOLSAL_MAX_VOXELS", "many")
    with pytest.raises(ScanError, match="VOLSAL_MAX_VOXELS='many' is not a number"):
        read_scan(path)
