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
