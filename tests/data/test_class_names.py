"""ImageNet-1k's classes have the published names and order; a file may name others."""

import logging

import pytest

from mlp_mixer.data import class_names


def test_the_bundled_file_is_imagenet_1k(root):
    text = (root / "mlp_mixer" / "data" / "imagenet_classes.txt").read_text()
    lines = text.splitlines()
    assert len(lines) == 1000
    ids = [line.split(" ")[0] for line in lines]
    assert ids == sorted(set(ids))
    assert all(len(i) == 9 and i[0] == "n" and i[1:].isdigit() for i in ids)
    assert all(line.partition(" ")[2].strip() for line in lines)
    for label, line in {
        0: "n01440764 tench, Tinca tinca",
        1: "n01443537 goldfish, Carassius auratus",
        281: "n02123045 tabby, tabby cat",
        285: "n02124075 Egyptian cat",
        504: "n03063599 coffee mug",
        999: "n15075141 toilet tissue, toilet paper, bathroom tissue",
    }.items():
        assert lines[label] == line
    assert list(class_names.imagenet()) == ids


def test_the_labels_are_those_of_tfds():
    """Which training on imagenet2012 uses."""
    tfds = pytest.importorskip("tensorflow_datasets")
    path = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
    assert path.read_text().split() == list(class_names.imagenet())


def test_no_two_classes_have_one_name():
    names = class_names.imagenet()
    assert len(set(names.values())) == 1000
    assert names["n02012849"] == "crane (n02012849)"
    assert names["n03126707"] == "crane (n03126707)"


def test_only_synset_ids_are_translated():
    ids = list(class_names.imagenet())
    assert class_names.readable(ids[:2]) == (
        "tench, Tinca tinca",
        "goldfish, Carassius auratus",
    )
    # ImageNet-21k: half words, half ids would be worse than ids.
    assert class_names.readable([ids[0], "n00004475"]) == (ids[0], "n00004475")
    assert class_names.readable(("0", "1")) == ("0", "1")


def test_what_has_no_names_is_numbered_but_for_imagenets_count(caplog):
    with caplog.at_level(logging.INFO):
        assert class_names.choose(None, 3) == ("class 0", "class 1", "class 2")
        assert not caplog.text
        names = class_names.choose(None, 1000)
    assert names == tuple(class_names.imagenet().values())
    assert caplog.text.count("taken to be ImageNet-1k's") == 1
    assert class_names.choose(["a", "b"], 2) == ("a", "b")
    assert class_names.choose([f"{i}" for i in range(1000)], 1000)[999] == "999"


def test_a_file_names_the_classes(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufeffcat \r\nsmall dog\n\n", encoding="utf-8")
    assert class_names.choose(["x", "y"], 2, labels=path) == ("cat", "small dog")
    path.write_text("n01440764\nn01443537\n")
    assert class_names.choose(None, 2, labels=path)[0] == "tench, Tinca tinca"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\n", r"has 2 names, but the model 3 classes; expected one name a line"),
        (b"a\n\nb\n", r"Line 2 of .* is empty"),
        (b"\xff\n", "is not text in UTF-8"),
    ],
)
def test_a_wrong_file_of_names_is_explained(content, message, tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        class_names.choose(None, 3, labels=path)
    with pytest.raises(FileNotFoundError, match="no file nowhere"):
        class_names.choose(None, 3, labels="nowhere")


def test_a_file_of_names_that_cannot_be_read_is_named(tmp_path):
    with open(tmp_path / "names.txt", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"names\.txt has more than"):
        class_names.choose(None, 3, labels=tmp_path / "names.txt")
