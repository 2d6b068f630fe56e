"""The program that prepares data sets, as README shows it."""

import pytest
import toy_imagenet

from mlp_mixer.data import sources


def test_one_command_prepares_what_is_then_listed(program, tmp_path):
    manual, data = tmp_path / "tars", tmp_path / "data"
    toy_imagenet.write_imagenet(manual)
    options = [f"--data_dir={data}", f"--manual_dir={manual}", "--noverify"]
    process = program("prepare", "imagenet2012", "imagenet2012_real", *options)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert "imagenet2012: 33 examples in " in said
    assert f"imagenet2012 is ready: {data}/imagenet2012/5.1.0" in said
    assert len(sources.open_source("imagenet2012", "train", data_dir=data)) == 24

    process = program("prepare", "list", *options)
    listed, _ = process.communicate(timeout=100)
    assert process.returncode == 0, listed
    rows = [[c.strip() for c in line.split("│")] for line in listed.splitlines()]
    cells = {row[1]: row[2:5] for row in rows if len(row) == 6 and row[1]}
    assert cells["imagenet2012"][1:] == ["155 GB", "5.1.0"]
    assert cells["cifar10"] == ["TensorFlow", "0.5 GB", ""]
    assert cells["vtab_dtd"] == ["dtd", "2 GB", ""]
    assert len([name for name in cells if name.startswith("vtab_")]) == 19


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagenet2012"], "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar must"),
        (["imagenet2013"], "TFDS knows no data set 'imagenet2013'. Near names: "),
    ],
)
def test_a_mistake_gets_one_line(arguments, message, program, tmp_path):
    process = program("prepare", *arguments, f"--data_dir={tmp_path}")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert message in said
    assert len(said.splitlines()) == 1
