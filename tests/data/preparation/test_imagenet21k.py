"""ImageNet-21k from a folder of class tars."""

import io
import tarfile

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
    # A class's tar in a tar, as some servers pack them.
    path.write_bytes(toy_imagenet.tar({"n00006024.tar": whole, "._a.JPEG": b"x"}))
    message = f"{path} holds no image, only 1 .tar, 1 hidden or of the system, as 1 of"
    with pytest.raises(ValueError, match=message):
        preparation.prepare("imagenet21k", data_dir=tmp_path)
    path.write_bytes((manual / "n00004475.tar").read_bytes())
    message = r"n00004475_\d+\.JPEG is there twice, in .*n00004475.tar and .*6024.tar"
    with pytest.raises(ValueError, match=message):
        preparation.prepare("imagenet21k", data_dir=tmp_path)
    path.write_bytes(whole)
    preparation.prepare("imagenet21k", data_dir=tmp_path)


def member(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def prepared(tmp_path, manual, tars):
    """The names of the images of a prepared set of those tars."""
    manual.mkdir(parents=True)
    for name, data in tars.items():
        (manual / name).write_bytes(data)
    preparation.prepare("imagenet21k", data_dir=tmp_path)
    source = sources.open_source("imagenet21k", "full", data_dir=tmp_path)
    return {
        source.name_of(i).partition("(")[2].rstrip(")"): source[i]["image"]
        for i in range(len(source))
    }


def test_what_macos_packs_beside_the_images_is_passed_by(manual, tmp_path, caplog):
    caplog.set_level("INFO")
    images = {f"n1_{i}.JPEG": toy_imagenet.photo(i, 20, 20) for i in range(3)}
    packed = toy_imagenet.as_macos_packs(images)
    packed |= {f"__MACOSX/{name}": b"x" for name in images}
    assert prepared(tmp_path, manual, {"n1.tar": toy_imagenet.tar(packed)}) == images
    line = "Left out of the tars of imagenet21k full: 6 hidden or of the system."
    assert [r.levelname for r in caplog.records if r.getMessage() == line] == ["INFO"]
    assert "imagenet21k: 3 images, 1 classes." in caplog.text


def test_what_is_no_image_in_a_tar_is_counted_by_kind(manual, tmp_path, caplog):
    photo = toy_imagenet.photo(1, 20, 20)
    others = {
        "notes.txt": b"x",
        "LICENSE": b"x",
        "empty.JPEG": b"",
        member("folder.JPEG", type=tarfile.DIRTYPE): b"",
        member("soft.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd"): b"",
        member("hard.JPEG", type=tarfile.LNKTYPE, linkname="a.JPEG"): b"",
        member("pipe.JPEG", type=tarfile.FIFOTYPE): b"",
        member("device.JPEG", type=tarfile.CHRTYPE): b"",
    }
    tars = {
        "n1.tar": toy_imagenet.tar({"a.JPEG": photo} | others),
        "n2.tar": toy_imagenet.tar({"b.JPEG": photo}),
        "n3.tar.gz": b"x",
        "n4.tar.part": b"x",
        "cat.tar": b"x",
        "._n1.tar": b"x",
    }
    assert prepared(tmp_path, manual, tars) == {"a.JPEG": photo, "b.JPEG": photo}
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == [
        f"Left out of {manual}: 1 .gz, 1 .part, 1 .tar, 1 hidden or of the system.",
        "Left out of the tars of imagenet21k full: 2 linked, 2 neither file nor folder,"
        " 1 .txt, 1 empty, 1 without an ending.",
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_odd_names_in_a_tar_are_names_only(form, manual, tmp_path):
    names = {
        "../../outside.JPEG": "outside.JPEG",
        "/etc/absolute.jpeg": "absolute.jpeg",
        "./n1/" + 200 * "x" + ".JPEG": 200 * "x" + ".JPEG",
        "n1/\u00e9\n\x1b.JPEG": "\u00e9\\n\\x1b.JPEG",
        "n1/\udcff.JPEG": "\\udcff.JPEG",  # a byte that is not UTF-8
        "n1/picture.tif": "picture.tif",
    }
    files = {name: toy_imagenet.photo(i, 20, 20) for i, name in enumerate(names)}
    found = prepared(tmp_path, manual, {"n1.tar": toy_imagenet.tar(files, form)})
    assert found == {names[name]: data for name, data in files.items()}


def test_a_size_below_zero_is_damage_not_a_loop(manual, tmp_path):
    info = member("a.JPEG", pax_headers={"size": "-512"})
    data = toy_imagenet.tar({info: b"x" * 700}, tarfile.PAX_FORMAT)
    with pytest.raises(ValueError, match=r"n1.tar is cut off or damaged"):
        prepared(tmp_path, manual, {"n1.tar": data})


def test_a_compressed_tar_is_not_taken_for_one(manual, tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        archive.addfile(member("a.JPEG", size=3), io.BytesIO(b"xxx"))
    with pytest.raises(ValueError, match=r"n1.tar is cut off or damaged"):
        prepared(tmp_path, manual, {"n1.tar": out.getvalue()})
