"""Runs and weight files of older versions: see golden/README.md."""

import json
import tarfile

import numpy as np
import pytest
from golden import record_run

from mlp_mixer import metrics, pretrained, train, workdir
from mlp_mixer.fingerprints import leaves

# {commit: what it was recorded with}
COMMITS = {
    "7895244": {},
    "a18020b": {"scan": True, "remat": "pre_gelu", "gelu": "exact"},
}


@pytest.fixture(params=COMMITS)
def commit(request):
    return request.param


@pytest.fixture
def old(root, commit, tmp_path):
    """The folder of what a commit wrote."""
    with tarfile.open(root / f"tests/golden/run_{commit}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def arrays(path):
    with np.load(path) as file:
        return dict(file)


def test_a_run_of_an_older_version_is_what_its_weight_files_are(old, commit):
    expected = arrays(old / "weights.npz")
    for source in ("run", "weights.safetensors", "weights.npz"):
        weights = pretrained.read(old / source)
        found = dict(leaves(weights.params))
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].tobytes() == array.tobytes(), (source, name)
        assert weights.image_size == (8, 8)
        if source != "weights.npz":
            assert weights.model["gelu"] == COMMITS[commit].get("gelu", "tanh")
            assert weights.class_names == tuple("0123456789")
            assert weights.preprocess == "vision_transformer"


def resumed(config, old, data_dir):
    """The greatest difference from where that version itself arrived."""
    state = train.train(config, old / "run", data_dir=data_dir)
    assert int(state.step) == record_run.END
    expected, found = arrays(old / "end.npz"), dict(leaves(state.params))
    assert found.keys() == expected.keys()
    ledgers = [
        {
            r["step"]: r["train/loss"]
            for r in metrics.read_file(path)
            if "train/loss" in r
        }
        for path in (old / "run/metrics.jsonl", old / "end.jsonl")
    ]
    assert [*ledgers[0]] == [*ledgers[1]] == [*range(1, record_run.END + 1)]
    losses = [list(ledger.values()) for ledger in ledgers]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    return max(np.abs(x - expected[name]).max() for name, x in found.items())


def test_a_run_of_an_older_version_goes_on_to_where_that_version_went(old, data_dir):
    config = workdir.load(old / "run")
    config.mesh.data = 4  # recorded on one device
    moved = [
        x - arrays(old / "weights.npz")[k] for k, x in arrays(old / "end.npz").items()
    ]
    assert max(np.abs(x).max() for x in moved) > 5e-3
    assert resumed(config, old, data_dir) < 1e-5


def test_the_recipe_of_an_older_version_still_says_the_same_run(
    root, old, commit, data_dir
):
    config = record_run.recipe(root, **COMMITS[commit])
    assert resumed(config, old, data_dir) < 1e-5


def test_another_recipe_is_told_from_that_of_an_older_run(root, old, commit, data_dir):
    config = record_run.recipe(root, **COMMITS[commit], dropout=0.3)
    with pytest.raises(ValueError, match=r"model\.dropout: 0\.1 there, 0\.3 here"):
        train.train(config, old / "run", data_dir=data_dir)
    assert json.loads((old / "run/config.json").read_text())["model"]["dropout"] == 0.1
