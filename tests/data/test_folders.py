"""Image folders: what is in them, their splits, and what they say when it is not."""

import io
import os
import pathlib
import pickle

import pytest
from PIL import Image

from mlp_mixer.data import decoding, folders, pipeline, sources


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
        with pytest.raises(ValueError, match=r"differ.*e\.g\. 'bee', 'cow'"):
            opened(tmp_path, split)


def test_folder_errors_say_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="one sub-folder of images per class"):
        opened(tmp_path / "nowhere", "train")
    write_images(tmp_path, {"ant": 1, "bee": 1})
    with pytest.raises(ValueError, match=r"train/<class>/\*.*the folders 'ant', 'bee'"):
        opened(tmp_path, "train")
    with pytest.raises(ValueError, match="incompatible with 2 examples"):
        opened(tmp_path, "all[:3]")
    for split in ("all[", "all[:x]", "all[:50%]+all[50%", "[:3]"):
        with pytest.raises(ValueError, match="'train"):
            opened(tmp_path, split)
    write_images(tmp_path / "both/train", {"ant": 1})
    with pytest.raises(ValueError, match="Write 'train' for train/"):
        opened(tmp_path / "both", "trai")
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
    with pytest.raises(
        ValueError, match=r"no image in photos/\*\.txt, only 1 \.txt; images end in"
    ):
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


def touch(root, *files):
    """Images, and files that are none."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".png"):
            Image.new("RGB", (5, 4)).save(root / file)
        else:
            (root / file).write_bytes(b"x")


TWO = ("ant/0.png", "bee/0.png")


def test_every_ending_that_the_decoder_reads_is_an_image(tmp_path):
    """Each format that Pillow writes, under all of its endings."""
    Image.init()
    picture = Image.new("RGB", (20, 16), (200, 100, 0))
    read = set()
    for ending, form in Image.registered_extensions().items():
        for mode in ("RGB", "L", "P", "1") * (form in Image.SAVE):
            data = io.BytesIO()
            try:
                picture.convert(mode).save(data, form)
                decoding.decode(data.getvalue())
            except (OSError, ValueError, DeprecationWarning):
                continue
            read.add(ending)
            for name in (f"0{ending}", f"1{ending.upper()}"):
                path = tmp_path / "all" / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data.getvalue())
            break
    assert {".tif", ".tiff", ".jfif", ".jpe", ".avif", ".jp2", ".pgm", ".dib"} <= read
    source = opened(tmp_path, "all")
    assert len(source) == 2 * len(
        read - {".pfm"}
    )  # of floats, where they are not bytes
    for i in range(len(source)):
        assert pipeline.read_image(source, i)[0].shape[-1] == 3
    assert folders.find_images(str(tmp_path)) == sorted(source.paths)
    # The rest can only be read.
    unwritten = {*folders.SUFFIXES} - read
    formats = {Image.registered_extensions()[ending] for ending in unwritten}
    assert formats <= Image.OPEN.keys() - Image.SAVE.keys()


def test_what_is_left_out_is_counted_by_kind_in_one_line(tmp_path, caplog):
    caplog.set_level("INFO")
    others = ("ant/a.txt", "ant/b.TXT", "bee/c.json", "bee/d.heic", "ant/e", "0.png")
    touch(tmp_path, *TWO, *others, "ant/._0.png", "bee/z.jpg?w=1", "bee/more/1.png")
    os.mkfifo(tmp_path / "ant" / "pipe.png")  # it would be read for ever
    assert len(opened(tmp_path, "all")) == 2
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    said, _, counts = record.getMessage().partition(f"Left out of {tmp_path}: ")
    assert said == ""
    assert counts.removesuffix(".").split(", ") == [
        "2 .txt",
        "1 .heic",
        "1 .jpg?w=1",
        "1 .json",
        "1 hidden or of the system",
        "1 image(s) beside the folders of classes",
        "1 image(s) in folders of a class (bee/more/1.png)",
        "1 neither file nor folder",
        "1 of other kinds",
    ]


def test_found_images_are_counted_likewise(tmp_path, caplog):
    touch(tmp_path, *TWO, "a.heic", "ant/b.heic", ".git/0.png", "__MACOSX/0.png")
    (tmp_path / "link").symlink_to(tmp_path)
    for pattern, line in {
        "": "2 .heic, 2 hidden or of the system, 1 linked folder(s)",
        "/*": "2 .heic, 2 hidden or of the system, 1 linked folder(s)",
        "/ant/*": "1 .heic",
    }.items():
        caplog.clear()
        folders.find_images(f"{tmp_path}{pattern}")
        assert [line in r.getMessage() for r in caplog.records] == [True], pattern


def test_files_of_systems_are_no_images_and_their_folders_no_classes(tmp_path, caplog):
    touch(tmp_path, *TWO)
    names = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", ".ipynb_checkpoints")
    touch(tmp_path, *(f"{name}/ant/0.png" for name in names), ".DS_Store")
    touch(tmp_path, *(f"ant/{name}/0.png" for name in names))
    touch(tmp_path, "ant/._0.png", "ant/Thumbs.db", "ant/desktop.ini", "bee/.DS_Store")
    for split in ("all", "all[:50%]"):
        assert opened(tmp_path, split).class_names == ("ant", "bee")
    assert len(folders.find_images(str(tmp_path))) == 2
    assert not caplog.records  # nobody needs to act


@pytest.mark.parametrize(
    ("files", "message"),
    {
        "one deeper": (
            [*TWO, "cat/2021/0.png", "cat/2022/1.png"],
            r"in 1 of 3 classes of .*: 'cat' \(2 lie deeper, such as cat/202\d/\d\.png",
        ),
        "two deeper": (
            ["bee/0.png", "ant/x/y/0.png"],
            r"'ant' \(1 lie deeper, such as ant/x/y/0\.png.*move images into <class>/",
        ),
        "splits": (
            ["train/ant/0.png", "val/ant/0.png"],
            "'train' .*'val' .*if these are splits, name one: 'train'",
        ),
        "not read": ([*TWO, "cat/0.heic", "cat/1.heic"], r"'cat' \(only 2 \.heic\)"),
        "hidden": ([*TWO, "cat/._0.png"], r"'cat' \(only 1 hidden"),
        "many": ([f"{i:02}/a.txt" for i in range(99)], r"99 of 99 .*'02' \(.*; …\. "),
        "no classes": (["0.png", "1.png"], r"It holds 2 image\(s\) beside the folders"),
    }.values(),
)
def test_a_class_without_images_is_refused_and_says_where_they_are(
    files, message, tmp_path
):
    touch(tmp_path, *files)
    with pytest.raises(ValueError, match=message) as caught:
        opened(tmp_path, "all")
    assert len(str(caught.value)) < 600


def test_an_empty_folder_is_a_class_only_where_it_is_evaluated(tmp_path, caplog):
    touch(tmp_path, *(f"train/{file}" for file in TWO), "val/ant/0.png")
    (tmp_path / "val" / "bee").mkdir()
    assert opened(tmp_path, "val").class_names == ("ant", "bee")
    assert "val has no image of 1 of its 2 classes: 'bee'" in caplog.text
    touch(tmp_path, "val/bee/x/0.png")
    with pytest.raises(ValueError, match=r"'bee' \(1 lie deeper"):
        opened(tmp_path, "val")
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"'cow' \(empty\)"):
        opened(tmp_path, "train")


def test_a_split_in_other_letters_is_named_and_compared(tmp_path):
    touch(tmp_path, *(f"Train/{file}" for file in TWO), "Val/ant/0.png")
    with pytest.raises(ValueError, match="Write 'Train', 'train' for"):
        opened(tmp_path, "train")
    with pytest.raises(ValueError, match=r"Val and .*Train differ.* e\.g\. 'bee'"):
        opened(tmp_path, "Val")


def test_classes_that_are_one_or_look_so_are_told(tmp_path, caplog):
    spelled = ("e\u0301", "\u00e9")  # as macOS and as others write é
    touch(tmp_path / "case", *TWO, "Ant/0.png")
    assert len(opened(tmp_path / "case", "all")) == 3
    assert "'Ant', 'ant' of " in caplog.text
    touch(tmp_path / "two", *(f"{name}/0.png" for name in spelled))
    message = r"'e\\u0301', '\\xe9' .*two Unicode spellings"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "two", "all")
    touch(
        tmp_path,
        *(f"{s}/{n}/0.png" for s, n in zip(("train", "val"), spelled, strict=True)),
    )
    with pytest.raises(ValueError, match=r"differ.*one name in two spellings"):
        opened(tmp_path, "val")


def test_links_to_classes_are_followed_and_say_when_they_lead_nowhere(tmp_path):
    touch(tmp_path, "all/ant/0.png", "all/bee/0.png", "elsewhere/1.png")
    root = tmp_path / "all"
    (root / "cow").symlink_to(tmp_path / "elsewhere")
    (root / "bee" / "1.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    source = opened(root, "all")
    assert (len(source), source.class_names) == (4, ("ant", "bee", "cow"))
    for name, target, message in (
        ("dog", "/nowhere", "dog is a link to '/nowhere', where nothing"),
        ("dog", "dog", "dog is a link to 'dog', where nothing"),
        ("dog", "ant", "'ant', 'dog' of .* are one folder"),
        ("dog", root, r"'dog' \(\d lie deeper"),
    ):
        (root / name).symlink_to(target)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            opened(root, "all")
        (root / name).unlink()


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, *TWO, "train/ant/0.png", "train/bee/0.png")
    scandir = os.scandir

    def refuse(path):  # tests may run as root, who reads everything
        if os.path.basename(path) == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for look in (
        lambda: opened(tmp_path, "train"),
        lambda: folders.find_images(str(tmp_path)),
        lambda: folders.find_images(f"{tmp_path}/*"),
    ):
        with pytest.raises(OSError, match=r"bee cannot be read \(Permission denied\)"):
            look()


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
