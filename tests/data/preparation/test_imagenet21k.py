"""ImageNet-21k from a folder of class tars."""

import pytest
import toy_imagenet

from mlp_mixer.data import preparation, sources


@pytest.fixture
def manual(tmp_path):
    return tmp_path / "downloads" / "manual" / "imagenet21k"


def test_labels_are_sorted_classes_and_slices_have_them_all(manual, tmp_path, caplog):
    caplog.set_level("INFO")
    images = toy_imagenet.write_imagenet21k(manual)
    preparation.prepare("imagenet21k", data_dir=tmp_path)
    assert "imagenet21k: 60 images, 3 classes." in caplog.text
    found = {}
    for split in ("full[:20]", "full[20:]"):
        source = sources.open_source("imagenet21k", split, data_dir=tmp_path)
        assert source.class_names == ("n00004475", "n00006024", "n15300051")
        assert {source[i]["label"] for i in range(len(source))} == {0, 1, 2}
        for i in range(len(source)):
            name = source.name_of(i).partition("(")[2].rstrip(")")
            assert name.startswith(source.class_names[source[i]["label"]])
            found[name] = source[i]["image"]
    assert found == images


def test_the_tars_may_lie_in_the_manual_folder_itself(tmp_path):
    toy_imagenet.write_imagenet21k(tmp_path / "tars", classes=("n1", "n2"))
    preparation.prepare(
        "imagenet21k", data_dir=tmp_path / "data", manual_dir=tmp_path / "tars"
    )
    source = sources.open_source("imagenet21k", "full", data_dir=tmp_path / "data")
    assert len(source) == 40


def test_no_tars_damaged_tars_and_empty_tars_are_told_apart(manual, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"such as n01440764.tar in {manual};"):
        preparation.prepare("imagenet21k", data_dir=tmp_path)
    toy_imagenet.write_imagenet21k(manual)
    path = manual / "n00006024.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{path} is cut off or damaged"):
        preparation.prepare("imagenet21k", data_dir=tmp_path)
    path.write_bytes(toy_imagenet.tar({}))
    with pytest.raises(ValueError, match=f"{path} holds no image, as 1 of 3 tars"):
        preparation.prepare("imagenet21k", data_dir=tmp_path)
    path.write_bytes((manual / "n00004475.tar").read_bytes())
    with pytest.raises(ValueError, match=r"n00004475_\d+\.JPEG is there twice"):
        preparation.prepare("imagenet21k", data_dir=tmp_path)
    path.write_bytes(whole)
    preparation.prepare("imagenet21k", data_dir=tmp_path)
