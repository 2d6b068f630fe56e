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


# --- Whose are whose ------------------------------------------------------------------


def places(names, known):
    return class_names.places(names, known, of="the photos", to="the model")


def test_a_part_of_the_classes_is_not_said_to_be_in_another_order(caplog):
    caplog.set_level("INFO")
    known = ("ant", "bee", "cat")
    assert class_names.places(("ant", "cat"), known, of="data", to="ours") == (0, 2)
    assert "data has 2 of the 3 classes of ours: they are mapped" in caplog.text
    assert "order" not in caplog.text


def test_the_same_names_in_another_order_are_mapped(caplog):
    caplog.set_level("INFO")
    assert places(("ant", "bee"), ["ant", "bee"]) is None
    assert not caplog.text
    assert places(("cat", "ant", "bee"), ["ant", "bee", "cat"]) == (2, 0, 1)
    assert "e.g. 'cat', 0 there, to 2" in caplog.text
    # A part of the classes.
    assert places(("cat", "bee"), ["ant", "bee", "cat"]) == (2, 1)
    assert places(("ant", "bee"), ["ant", "bee", "cat"]) is None


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (("Cafe\u0301", "zoo"), ("Caf\u00e9", "zoo")),
        (("Caf\udcc3\udca9", "zoo"), ("Caf\u00e9", "zoo")),
        (("n01440764", "n01443537"), ("tench, Tinca tinca", "n01443537")),
        (("crane (n02012849)",), ("n02012849",)),
        (("0", "1", "2"), ("ant", "bee", "cat")),
        (("ant", "bee", "cat"), ("0", "1", "2")),
        (("00", "01", "02"), ("0", "1", "2")),
        (None, ("ant", "bee")),
        (("ant", "bee"), None),
        (None, None),
    ],
)
def test_two_names_of_a_class_are_one_and_numbers_are_none(names, known):
    assert places(names, known) is None


def test_spellings_in_another_order_are_mapped():
    """Sorted, "e" and an accent come before "f", and "é" behind "z"."""
    mac = sorted(["cafe\u0301", "caff", "zoo"])
    others = sorted(["caf\u00e9", "caff", "zoo"])
    assert places(mac, others) == (1, 0, 2)
    ids = list(class_names.imagenet())
    words = sorted(class_names.imagenet().values())
    found = places(words, ids)
    assert found is not None
    assert [class_names.imagenet()[ids[i]] for i in found] == words


def test_a_thousand_nameless_classes_are_imagenets_for_data_of_imagenet_alone():
    ids = tuple(class_names.imagenet())
    assert class_names.assumed(["tench, Tinca tinca", ids[5]], 1000) == ids
    for names, count in ((["tench", ids[5]], 1000), (ids, 999), (None, 1000)):
        assert class_names.assumed(names, count) is None


@pytest.mark.parametrize("count", [11, 1000])
@pytest.mark.parametrize("known", ["nothing", "words", "numbers"])
def test_numbers_that_a_folder_sorts_as_words_mean_their_labels(count, known):
    """ImageNet-v2's folders are "0" … "999": the third is "10"."""
    names = sorted(map(str, range(count)))
    others = {
        "nothing": None,
        "words": [f"n{i}" for i in range(count)],
        "numbers": [*map(str, range(count))],
    }[known]
    assert places(names, others) == tuple(map(int, names))
    if others:
        inverse = places(others, names)
        assert inverse is not None
        assert [names[i] for i in inverse] == [*map(str, range(count))]


@pytest.mark.parametrize(
    ("names", "known", "message"),
    [
        (
            ("ant", "bee"),
            ("ant", "cow"),
            r"\n  Only the photos: 'bee'\.\n  Only the mo",
        ),
        (("Ant", "bee"), ("ant", "bee"), r"Only the photos: 'Ant'\..*model: 'ant'\."),
        (("ant", "bee", "cow"), ("ant", "bee"), r"Only the photos: 'cow'\.$"),
        (("1", "2"), ("ant", "bee"), r"Only the photos: '1', '2'\..*'ant', 'bee'"),
        (("0", "1", "2"), ("ant", "bee"), "Only the photos: '0', '1', '2'"),
        (("1", "10", "2"), ("0", "1", "2"), "Only the photos: '10'.*model: '0'"),
        (
            [f"a{i}" for i in range(12)],
            [f"b{i}" for i in range(13)],
            "'a9' and 2 more.*'b9' and 3 more",
        ),
        (("a\x1b[31m\n",), ("b\udcff",), r"'a\\x1b\[31m\\n'.*'b\\udcff'"),
        (("ant", "bee", "ant"), ("ant", "ant", "bee"), "'ant' is there more than once"),
    ],
)
def test_different_names_are_listed(names, known, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        places(names, known)


def test_a_file_may_have_other_words_for_the_same_classes_only(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "names.txt"
    path.write_text("ant\nBiene\ncat\n")
    known = ("ant", "bee", "cat")
    assert class_names.choose(known, 3, labels=path) == ("ant", "Biene", "cat")
    assert (
        "other words than the weights for 1 of 3 classes, e.g. 'Biene' for 'bee'"
        in (caplog.text)
    )
    caplog.clear()
    path.write_text("ant\nbee\ncat\n")
    assert class_names.choose(known, 3, labels=path) == known
    assert not caplog.text


@pytest.mark.parametrize(
    ("known", "lines", "message"),
    [
        (
            ("ant", "bee", "cat"),
            "bee\nant\ncat",
            r"Line 1 of .* is 'bee'.*of class 1.*2",
        ),
        (
            ("ant", "bee", "cat"),
            "Katze\nbee\nant",
            r"Line 3 of .* is 'ant'.*of class 0",
        ),
        (("n01443537", "n01440764"), "tench, Tinca tinca\nx", "Line 1 .* of class 1"),
        (("caf\u00e9", "zoo"), "zoo\ncafe\u0301", "Line 1 of .* is 'zoo'"),
        (("0", "1", "10", "2"), "0\n1\n2\n10", "Line 3 of .* is '2'.* of class 3"),
    ],
)
def test_a_file_of_names_in_another_order_is_refused(known, lines, message, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        class_names.choose(known, len(known), labels=path)


def test_names_for_another_number_of_classes_are_refused():
    with pytest.raises(ValueError, match="name 2 classes, but their head has 3"):
        class_names.choose(("ant", "bee"), 3)
