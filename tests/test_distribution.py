"""What is installed is this project: `mlp-mixer` on the index is somebody else's."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
TEXTS = [
    path
    for pattern in ("*.md", "mlp_mixer/**/*.py", "scripts/*.py", "configs/**/*.py")
    for path in ROOT.glob(pattern)
]


def test_the_distribution_has_a_name_of_its_own():
    assert PROJECT["name"] == "mlp-mixer-jax"


def test_every_instruction_to_install_takes_the_clone_and_an_extra_that_it_has():
    found = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        assert "mlp-mixer[" not in text, path
        found += re.findall(r"pip install '?(\.?[\w-]*(?:\[\w+\])?)", text)
    assert not [name for name in found if name.startswith("mlp")]
    ours = [name for name in found if name.startswith(".")]
    assert len(ours) > 6  # README's and the errors'
    extras = {f".[{extra}]" for extra in PROJECT["optional-dependencies"]}
    assert set(ours) <= extras | {"."}


def test_an_extra_that_takes_another_names_this_distribution():
    extras = PROJECT["optional-dependencies"]
    ours = [r for rs in extras.values() for r in rs if r.startswith("mlp-mixer")]
    assert ours == ["mlp-mixer-jax[export,gcs]"]
