"""Tests for files of Nequix that are corrupted or not supported; see also test_program_files.py."""

import io
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from mlip_jax import importers
from mlip_jax.importers.formats import nequix_files
from mlip_jax.importers.formats.weights import WeightsError

CONTENT = lzma.decompress((Path(__file__).with_name("files") / "nequix.nqx.xz").read_bytes())
LINE, _, ARRAYS = CONTENT.partition(b"\n")


def npy(array, **options):
    """Return an array in the format of numpy.save."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def with_settings(**changes):
    return json.dumps(json.loads(LINE) | changes).encode() + b"\n" + ARRAYS


HUGE = npy(np.zeros(3)).replace(b"(3,), }" + b" " * 12, b"(3000000000000,), }", 1)
BAD = {
    "truncated": (CONTENT[:-40], "truncated"),
    "an array less": (
        CONTENT[: CONTENT.rindex(b"\x93NUMPY")],
        "readout must have shape .* the end",
    ),
    "an array more": (CONTENT + npy(np.zeros(3, "f4")), "1 arrays more"),
    "huge array": (LINE + b"\n" + HUGE, "truncated: an array of 24,000,000,000,000 bytes"),
    "pickle": (LINE + b"\n" + npy(np.array([{}], object), allow_pickle=True), "real numbers"),
    "no array": (LINE + b"\nabc", "corrupted or truncated"),
    "other widths": (with_settings(radial_mlp_size=16), "radial_mlp must have shape .4, 16."),
    "both parities": (with_settings(hidden_irreps="8x0e + 4x1o + 4x1e"), "one irrep for each"),
    "wrong irreps": (with_settings(hidden_irreps="8y0e"), "irreps must have the form"),
    "few harmonics": (with_settings(lmax=1), "harmonics_degree must be at least max_degree=2"),
    "power": (with_settings(radial_polynomial_p=2.5), "must be an integer, received 2.5"),
    "missing setting": (with_settings(cutoff=None), "the settings lack cutoff"),
    "text": (with_settings(n_layers=[2]), "invalid settings"),
    "many layers": (with_settings(n_layers=10**9), "layers"),
    "many hidden layers": (with_settings(radial_mlp_layers=10**10), "radial_mlp_layers"),
    "unknown element": (with_settings(atomic_numbers=[1, 6, 500]), "must differ and be 1 to 118"),
    "element twice": (with_settings(atomic_numbers=[1, 6, 6]), "must differ and be 1 to 118"),
    "repulsion": (with_settings(add_repulsion=True), "add_repulsion is not supported"),
    "form of PyTorch": (LINE + b"\nPK\x03\x04" + ARRAYS, "writes X.nqx"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_rejected(tmp_path, name):
    """Detects files that are read as other weights, use all memory, or end in a foreign error."""
    content, message = BAD[name]
    path = tmp_path / "X.nqx"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        importers.load_force_field(path)


def test_files_are_recognized_by_their_content(tmp_path):
    for content in (b"", b"{", b'{"a": 1}\n', b"[" * 100_000 + b"\n", ARRAYS, b"{" * 10_000_000):
        (tmp_path / "X").write_bytes(content)
        assert not nequix_files.is_nequix(tmp_path / "X")
    assert not nequix_files.is_nequix(tmp_path)
    (tmp_path / "X").write_bytes(CONTENT)
    assert nequix_files.is_nequix(tmp_path / "X")
    with pytest.raises(WeightsError, match="not a file of Nequix"):
        (tmp_path / "Y").write_bytes(ARRAYS)
        nequix_files.read(tmp_path / "Y")
