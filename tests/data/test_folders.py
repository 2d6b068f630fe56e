"""Image folders: what is in them, their splits, and what they say when it is not."""

import pathlib
import pickle

import pytest
from PIL import Image

from mlp_mixer.data import folders, sources


def write_images(root, counts, suffix=".png"):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (5, 4), (i, 0, 0)).save(root / name / f"{i:03}{suffix}")


def opened(root, split, **kwargs):
    return sources.open_source(f"folder:{root}", split, **kwargs)


def test_a_folder_with_splits_has_them(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "ant": 2, "bee": 4})
    write_images(tmp_path / "val", {"cat": 1, "ant": 1, "bee": 1}, ".JPEG")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / "._000.png").write_text("nor this")
    train, val, both = (
        opened(tmp_path, s, num_classes=3) for s in ("train", "val", "train+val[1:]")
    )
    assert train.class_names == ("ant", "bee", "cat")
    assert (len(train), len(val), len(both)) == (9, 3, 11)
    for source in (train, val, both):
        for i in range(len(source)):
            path = pathlib.Path(source.name_of(i))
            assert source.class_names[source[i]["label"]] == path.parent.name
            assert source[i]["image"] == path.read_bytes()
    assert pickle.loads(pickle.dumps(train)).name_of(4) == train.name_of(4)


def test_slices_of_a_folder_partition_it_and_mix_its_classes(tmp_path):
    write_images(tmp_path, {"ant": 50, "bee": 50})
    names = {
        split: [source.name_of(i) for i in range(len(source))]
        for split in ("all", "all[:90%]", "all[90%:]", "all[-4:]")
        for source in [opened(tmp_path, split)]
    }
    assert names["all[:90%]"] + names["all[90%:]"] == names["all"]
    assert names["all[-4:]"] == names["all"][-4:]
    assert len(set(names["all"])) == 100
    held_out = opened(tmp_path, "all[90%:]")
    assert len(held_out) == 10
    assert {held_out[i]["label"] for i in range(10)} == {0, 1}
    assert held_out.class_names == ("ant", "bee")


def test_splits_of_a_folder_must_agree_on_the_classes(tmp_path):
    write_images(tmp_path / "train", {"ant": 1, "bee": 1})
    write_images(tmp_path / "val", {"ant": 1, "cow": 1})
    for split in ("val", "val+train"):
        with pytest.raises(ValueError, match=r"differ.*\['bee', 'cow'\]"):
            opened(tmp_path, split)


def test_folder_errors_say_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="one sub-folder of images per class"):
        opened(tmp_path / "nowhere", "train")
    write_images(tmp_path, {"ant": 1, "bee": 0})
    with pytest.raises(ValueError, match=r"train/<class>/\*.*\('ant', 'bee'\)"):
        opened(tmp_path, "train")
    with pytest.raises(ValueError, match="incompatible with 1 examples"):
        opened(tmp_path, "all[:2]")
    write_images(tmp_path / "empty", {"train": 0})
    with pytest.raises(ValueError, match="No images"):
        opened(tmp_path / "empty", "all")


def test_images_are_found_by_file_folder_and_glob(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", {"a": 2, "b": 1})
    for name in ("photos/notes.txt", "photos/a/._0.png", "photos/.git/x.png", "odd"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    everything = ["photos/a/000.png", "photos/a/001.png", "photos/b/000.png"]
    find = folders.find_images
    assert find("photos") == everything
    assert find("photos/*") == everything
    assert find("photos/**") == everything  # each once
    assert find("photos/*/000.png") == [everything[0], everything[2]]
    assert find("odd") == ["odd"]  # what is named is taken at its word
    (tmp_path / "[a].png").write_bytes(b"x")
    assert find("[a].png") == ["[a].png"]
    for nothing in ("photos/none", "none*.png"):
        with pytest.raises(FileNotFoundError, match=nothing.replace("*", r"\*")):
            find(nothing)
    with pytest.raises(ValueError, match=r"no image in photos/\*\.txt; images end in"):
        find("photos/*.txt")


def test_a_glob_finds_a_file_once_however_many_links_lead_there(tmp_path):
    write_images(tmp_path / "photos", {"a": 1})
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "b").symlink_to(tmp_path / "photos" / "a")
    for path in ("", "/*", "/**", "/**/*.png"):
        assert len(folders.find_images(f"{tmp_path}/photos{path}")) == 1, path


def test_files_without_labels_are_a_source(tmp_path):
    write_images(tmp_path, {"a": 2})
    paths = folders.find_images(str(tmp_path))
    source = folders.open_files(reversed(paths))
    assert isinstance(source, sources.Source)
    assert [source.name_of(i) for i in range(2)] == paths[::-1]
    assert [source[i]["label"] for i in range(2)] == [0, 0]
    assert source[0]["image"] == pathlib.Path(paths[1]).read_bytes()


@pytest.mark.parametrize("name", ["photo[1].jpg", "a*b.png", "what?.png", "[!x].png"])
def test_a_path_that_exists_is_no_glob(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in (name, "photo1.jpg", "aXb.png", "whatX.png", "y.png"):
        Image.new("RGB", (5, 4)).save(tmp_path / file)
    assert folders.find_images(name) == [name]
    assert folders.find_images(f"~/{name}") == [f"{tmp_path}/{name}"]
    # And so is the beginning of a glob.
    inside = tmp_path / "shots [2]"
    write_images(inside, {"a": 2})
    (tmp_path / "shots 2").mkdir()
    both = [f"shots [2]/a/{i:03}.png" for i in range(2)]
    assert folders.find_images("shots [2]/a/*.png") == both
    assert folders.find_images("shots [2]/*/00?.png") == both
    with pytest.raises(FileNotFoundError, match="no match for"):
        folders.find_images("shots [3]/*.png")


def test_photos_of_a_folder_that_exif_turns_are_counted_once(tmp_path, caplog):
    caplog.set_level("INFO")
    write_images(tmp_path, {"ant": 2, "bee": 1})
    opened(tmp_path, "all")
    assert not caplog.records
    exif = Image.Exif()
    for i, orientation in enumerate((1, 3, 6)):
        exif[0x0112] = orientation
        path = tmp_path / "ant" / f"photo{i}.jpg"
        Image.new("RGB", (5, 4)).save(path, exif=exif)
    (tmp_path / "bee" / "broken.jpg").write_bytes(b"x")
    opened(tmp_path, "all")
    (record,) = caplog.records
    said = (
        "2 of 7 images looked at are turned by Exif; they are read as they are stored"
    )
    assert said in record.getMessage()
