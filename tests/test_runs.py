"""A run's folder explains itself; that a run of another recipe is refused is in
test_train.
"""

import pytest
from test_recipe import load

from mlp_mixer import runs


def test_a_workdir_gives_its_recipe_back(root, tmp_path):
    config = load(root, "mixer_b16")
    runs.claim(config, tmp_path, ("cat", "dog"))
    assert runs.load(tmp_path).to_dict() == config.to_dict()
    assert runs.load_class_names(tmp_path) == ["cat", "dog"]
    with pytest.raises(FileNotFoundError, match="holds no run"):
        runs.load(tmp_path / "nowhere")


def test_another_recipe_may_take_a_folder_until_there_is_a_result(root, tmp_path):
    """A run that could not start, for a wrong path say, is started again corrected."""
    config = load(root, "mixer_b16")
    runs.claim(config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    config.init_from = "corrected.npz"
    runs.claim(config, tmp_path)
    assert runs.load(tmp_path).init_from == "corrected.npz"
    (tmp_path / "metrics.jsonl").write_text('{"step": 50}\n')
    config.init_from = "other.npz"
    with pytest.raises(
        ValueError, match=r"init_from: corrected\.npz there, other\.npz"
    ):
        runs.claim(config, tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "checkpoints" / "00000010").mkdir()
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        runs.claim(config, tmp_path)
