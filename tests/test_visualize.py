"""The report draws what it was given. (Whether it is a good picture, a person says.)"""

import io
import itertools

import numpy as np
import PIL.Image
import pytest
from matplotlib.text import Text
from odd_names import NAMES

from mlp_mixer import visualize
from mlp_mixer.data import sources
from mlp_mixer.evaluators import accuracy


def examples(classes=3, n=30):
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, n)
    prediction = np.where(rng.random(n) < 0.8, label, (label + 1) % classes)
    return accuracy.Examples(
        sources.open_source("synthetic", "test", num_examples=n, num_classes=classes),
        index=np.arange(n),
        label=label,
        prediction=prediction,
        probability=rng.uniform(0.4, 1.0, n).astype(np.float32),
        top1=label == prediction,
        top5=np.ones(n, bool),
        loss=np.ones(n, np.float32),
        nll=np.ones(n, np.float32),
    )


RECORDS = [
    {"step": 1, "train/loss": 3.0, "train/lr": 0.1},
    {"step": 2, "train/loss": 2.0, "train/lr": 0.2},
    {"step": 2, "val/top1": 0.5, "val/top5": 0.9, "val/loss": 2.5},
]


def test_mistakes_come_first_the_surest_first():
    seen = examples()
    order = visualize.mistakes_first(seen, 30)
    wrong = int((~seen.top1).sum())
    assert 0 < wrong < 30
    assert not seen.top1[order[:wrong]].any()
    assert seen.top1[order[wrong:]].all()
    assert (np.diff(seen.probability[order[:wrong]]) <= 0).all()
    assert (np.diff(seen.probability[order[wrong:]]) >= 0).all()
    assert len(visualize.mistakes_first(seen, 7)) == 7


@pytest.mark.parametrize("classes", [3, visualize.MAX_CONFUSION_CLASSES + 1])
def test_the_report_holds_curves_confusion_and_every_image(classes):
    seen = examples(classes)
    shown = visualize.mistakes_first(seen, 12)
    images = [np.full((4, 6, 3), 10 * i, np.uint8) for i in range(12)]
    figure = visualize.report(
        RECORDS,
        name="val",
        examples=seen,
        shown=shown,
        images=images,
        truths=[
            [int(seen.label[i]), (int(seen.label[i]) + 2) % classes] for i in shown
        ],
        class_names=[f"a rather long class name {i}" for i in range(classes)],
    )
    axes = {axis.get_title(): axis for axis in figure.axes}
    # All true classes of a mistake are named.
    wrong = int((~seen.top1).sum())
    said = [axis.get_title() for axis in figure.axes if "%)" in axis.get_title()]
    assert [" or " in title.replace("\n", " ") for title in said] == [
        i < wrong for i in range(12)
    ]
    curves = [line.get_ydata() for line in axes["loss"].lines]
    assert [list(map(float, y)) for y in curves] == [[3.0, 2.0], [2.5]]
    assert len(axes["accuracy"].lines) == 2
    assert ("confusion" in axes) == (classes == 3)
    drawn = [
        axis.images[0].get_array()
        for axis in figure.axes
        if axis.images and axis.get_title() != "confusion"
    ]
    assert len(drawn) == 12
    for one, other in zip(drawn, images, strict=True):
        np.testing.assert_array_equal(one, other)
    if classes == 3:
        expected = np.zeros((3, 3))
        np.add.at(expected, (seen.label, seen.prediction), 1)
        shares = axes["confusion"].images[0].get_array()
        np.testing.assert_allclose(shares, expected / expected.sum(1, keepdims=True))
    picture = PIL.Image.open(io.BytesIO(visualize.png(figure)))
    assert picture.size[0] == 1500


def test_a_run_without_records_still_has_a_report():
    seen = examples()
    figure = visualize.report(
        [],
        name="val",
        examples=seen,
        shown=[],
        images=[],
        truths=[],
        class_names=list("abc"),
    )
    assert visualize.png(figure).startswith(b"\x89PNG")


def test_a_report_says_where_the_time_went_if_that_is_recorded():
    records = [{"step": 1, "seconds/steps": 90.0, "seconds/input": 10.0}]
    seen = examples()
    options = {"name": "val", "examples": seen, "class_names": list("abc")}
    nothing: dict = {"shown": [], "images": [], "truths": []}
    said = titles_and_labels(visualize.report(records, **options, **nothing))
    assert any(text.startswith("90.0 % of 1 min 40 s went into") for text in said)


@pytest.mark.parametrize("count", [1, 7, 60])
def test_the_sheet_holds_every_image_with_its_classes(count):
    rng = np.random.default_rng(0)
    shapes = [(8, 8, 3), (30, 90, 3), (200, 50, 3)]
    images = [rng.integers(0, 256, shapes[i % 3], np.uint8) for i in range(count)]
    long = "a name that does not fit at all, " * 5
    captions = [f"$a {'long ' * 30}$/{i}.png" for i in range(count)]
    figure = visualize.sheet(
        images,
        captions=captions,
        classes=[("cat $_$", long)] * count,
        probabilities=[(0.75, 0.25)] * count,
        title="a $title$ 日本",
    )
    pictures = [axis for axis in figure.axes if axis.images]
    bars = [axis for axis in figure.axes if axis.patches]
    assert len(pictures) == len(bars) == count
    drawn = visualize.png(figure)
    width, height = PIL.Image.open(io.BytesIO(drawn)).size
    # In the order given, whole on the sheet, and every text where it belongs.
    page = np.array([0, 0, width, height])
    for i, (picture, bar) in enumerate(zip(pictures, bars, strict=True)):
        np.testing.assert_array_equal(picture.images[0].get_array(), images[i])
        assert picture.get_title().endswith(f"/{i}.png")
        widths = [
            patch.get_path().get_extents(patch.get_patch_transform()).width
            for patch in bar.patches
        ]
        assert widths == [0.75, 0.25]
        texts = [text.get_text() for text in bar.texts]
        assert texts[:2] == ["cat $_$", "75.0 %"]
        assert texts[2].endswith("…")
        boxes = [text.get_window_extent() for text in bar.texts]
        assert boxes[2].x1 < boxes[3].x0
        for box in (*boxes, picture.title.get_window_extent()):
            assert (page[:2] <= box.min).all()
            assert (box.max <= page[2:]).all()
    tops = [p.get_window_extent().y1 for p in pictures]
    assert tops == sorted(tops, reverse=True) or count > 6


def test_the_learning_rates_show_every_accuracy_and_ring_the_chosen():
    curves = {"one": {0.03: 0.7, 0.01: 0.9, 0.06: None}, "two": {0.01: 0.5}}
    figure = visualize.learning_rates(curves, {"one": 0.01, "two": 0.01})
    (axis,) = figure.axes
    points = [np.asarray(line.get_xydata()).tolist() for line in axis.lines]
    assert points == [
        *([[0.01, 90], [0.03, 70]], [[0.01, 90]]),
        *([[0.01, 50]], [[0.01, 50]]),
    ]
    assert [text.get_text() for text in axis.get_xticklabels()] == [
        *("0.01", "0.03", "0.06")
    ]
    assert visualize.png(figure)[:4] == b"\x89PNG"


def titles_and_labels(figure):
    """Every text of a figure, as it is drawn."""
    visualize.png(figure)
    return [text.get_text() for text in figure.findobj(Text)]


def odd_report(class_names, name="val", key="val"):
    seen = examples(len(class_names), 40)
    shown = visualize.mistakes_first(seen, 12)
    records = [{"step": 1, f"{key}/loss": 2.0, f"{key}/top1": 0.5}]
    return visualize.report(
        records,
        name=name,
        examples=seen,
        shown=shown,
        images=[np.zeros((4, 6, 3), np.uint8)] * 12,
        truths=[[int(seen.label[i])] for i in shown],
        class_names=class_names,
    )


def test_a_report_shows_any_name_as_it_is():
    said = titles_and_labels(odd_report([*NAMES.values()], "va$l_{", "_o$dd$"))
    # No mathematics: on the axes, and above images.
    assert {"Ba$$in", "Ba$$in $x…ac{a"} <= {*said}
    assert any("Ba$$in (" in text or "is Ba$$in" in text for text in said)
    assert "[bold]red…k=x]" in said
    assert r"caf\udce9…dcff" in said
    assert any(text.startswith("va$l_{: ") for text in said)
    # An underscore hides a line from matplotlib's own legends.
    assert {"_o$dd$", "_o$dd$/top1"} <= {*said}
    assert not any(set("\n\r\t\x1b") & {*text.replace("\nis ", "")} for text in said)


def test_a_sheet_and_the_learning_rates_show_any_name():
    names = [*NAMES.values()]
    figure = visualize.sheet(
        [np.zeros((4, 6, 3), np.uint8)] * len(names),
        captions=names,
        classes=[(name, "b") for name in names],
        probabilities=[(0.75, 0.25)] * len(names),
        title="".join(names),
    )
    said = titles_and_labels(figure)
    for name in (r"caf\udce9 \udcff", "Ba$$in", "Ba$$in $x_1^{2}$ \\frac{a"):
        assert said.count(name) == 2  # above an image, and beside its bar
    rates = {name: {0.1: 0.5} for name in names}
    figure = visualize.learning_rates(rates, dict.fromkeys(names, 0.1))
    assert {r"caf\udce9 \udcff", "_e_"} <= {*titles_and_labels(figure)}


def test_forty_long_names_stay_apart_and_on_the_page():
    names = [
        f"{'the same beginning of a hundred characters ' * 2}{i:04}" for i in range(40)
    ]
    figure = odd_report(names)
    visualize.png(figure)
    (confusion,) = (a for a in figure.axes if a.get_title() == "confusion")
    labels = confusion.get_yticklabels()
    assert len({label.get_text() for label in labels}) == 40
    boxes = [label.get_window_extent() for label in labels]
    assert all(below.y0 >= above.y1 for above, below in itertools.pairwise(boxes[::-1]))
    assert all(box.x0 >= 0 for box in boxes)
