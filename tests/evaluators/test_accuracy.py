"""Every example is counted once."""

import dataclasses
import itertools

import coloured
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from set_up import random_params

from mlp_mixer import evaluators, recipe, sharding, steps
from mlp_mixer.data import pipeline, sources
from mlp_mixer.evaluators import accuracy
from mlp_mixer.models.mixer import MlpMixer

CLASSES = 8


def model():
    return MlpMixer(
        patch_size=(4, 4),
        num_blocks=1,
        hidden_dim=16,
        tokens_mlp_dim=8,
        channels_mlp_dim=64,
        num_classes=CLASSES,
    )


def random_variables():
    return {"params": random_params(model(), (16, 16), seed=0)}


def make(mesh, count, batch_size, loss="softmax_xent", split="test"):
    section = {
        "type": "accuracy",
        "every_steps": 1,
        "ece_bins": 0,
        "batch_size": batch_size,
        "preprocess": "vision_transformer",
        "dataset": {
            "name": "synthetic",
            "split": split,
            "num_examples": count,
            "num_classes": CLASSES,
        },
    }
    return evaluators.create(
        {"test": section},
        predict=steps.make_predict(model(), mesh),
        mesh=mesh,
        loss=loss,
        image_size=(16, 16),
        data_dir=None,
    )["test"]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("count", "batch_size"), [(64, 32), (67, 32), (67, 16), (5, 64), (67, 10)]
)
def test_every_example_is_counted_once(devices, count, batch_size):
    """Batch sizes that divide the split and those that do not, nor the devices."""
    evaluator = make(sharding.make_mesh(devices), count, batch_size)
    variables = random_variables()
    examples = evaluator.examples(variables)
    assert sorted(examples.index) == list(range(count))
    assert evaluator.summary(examples)["count"] == count
    # Against the definition, image by image.
    source = evaluator.source
    images = np.stack([pipeline.read_image(source, i)[0] for i in range(count)])
    labels = np.array([source[i]["label"] for i in range(count)])
    apply = jax.jit(lambda x: model().apply(variables, x)[0])
    logits = np.asarray(apply(steps.value_range(jnp.asarray(images))), np.float64)
    order = np.argsort(-logits, axis=-1)
    results = evaluator.run(variables).metrics
    assert results["top1"] == pytest.approx((order[:, 0] == labels).mean())
    top5 = (order[:, :5] == labels[:, None]).any(-1)
    assert results["top5"] == pytest.approx(top5.mean())
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    nll = log_sum + logits.max(-1) - logits[np.arange(count), labels]
    assert results["loss"] == pytest.approx(nll.mean(), rel=1e-5)
    assert results["nll"] == results["loss"]  # of softmax, of one label
    if count > 20:  # neither chance nor a constant passes the comparison above
        assert 0 < results["top1"] < results["top5"] < 1


def test_the_loss_is_the_recipes():
    variables = random_variables()
    mesh = sharding.make_mesh(1)
    softmax, sigmoid = (
        make(mesh, 16, 16, loss).run(variables).metrics
        for loss in ("softmax_xent", "sigmoid_xent")
    )
    assert sigmoid["loss"] > softmax["loss"] + 1
    assert sigmoid["nll"] == softmax["nll"]


def test_a_stop_ends_it_between_batches_without_a_result():
    evaluator = make(sharding.make_mesh(1), 64, 16)
    asked: list[bool] = []

    def stop():
        asked.append(True)
        return len(asked) > 2

    assert evaluator.run(random_variables(), stop) is None
    assert len(asked) == 3


def test_broken_images_are_left_out_and_counted(monkeypatch):
    evaluator = make(sharding.make_mesh(8), 20, 8)
    read = pipeline.read_image

    def fragile(source, index, dct="fast", **_):
        if index in (3, 19):
            raise ValueError("truncated")
        return read(source, index, dct)

    monkeypatch.setattr(pipeline, "read_image", fragile)
    variables = random_variables()
    results = evaluator.run(variables).metrics
    assert (results["count"], results["broken"]) == (18, 2)
    monkeypatch.setattr(pipeline, "read_image", read)
    assert "broken" not in evaluator.run(variables).metrics


# Logits of six images over four classes, and which classes are true.
LOGITS = np.log(
    [
        [0.7, 0.1, 0.1, 0.1],
        [0.7, 0.1, 0.1, 0.1],
        [0.4, 0.3, 0.2, 0.1],
        [0.1, 0.6, 0.2, 0.1],
        [0.1, 0.1, 0.1, 0.7],
        [0.2, 0.2, 0.3, 0.3 + 1e-6],
    ]
)
TRUE: list[list[int]] = [[0], [1, 2], [1, 0], [], [3, 0, 1], [2]]


@dataclasses.dataclass
class Labelled:
    """Image i has the value i everywhere."""

    labels: list[list[int]]
    num_classes: int = 4
    class_names = None
    multi_label = True

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = np.full((16, 16, 3), index, np.uint8)
        return {"image": image, "label": self.label(index)}

    def label(self, index):
        return np.array(self.labels[index], np.int64)

    def name_of(self, index):
        return str(index)


def of_labels(monkeypatch, labels, logits, devices, **fields):
    """An evaluator of images with these labels, for a model with these logits."""
    monkeypatch.setattr(sources, "open_source", lambda **_: Labelled(labels))
    table = jnp.asarray(logits, jnp.float32)

    def predict(variables, batch):
        image = batch["image"]
        index = image[:, 0, 0, 0].astype(int)
        return {"logits": table[index], "pre_logits": image[:, 0, 0]}

    return accuracy.Accuracy(
        predict=jax.jit(predict),
        mesh=sharding.make_mesh(devices),
        loss="sigmoid_xent",
        image_size=(16, 16),
        dataset={"name": "real", "split": "validation"},
        preprocess="vision_transformer",
        batch_size=4,
        every_steps=1,
        **{"ece_bins": 0} | fields,
    )


@pytest.mark.parametrize("devices", [1, 8])
def test_any_of_several_labels_is_right_and_unlabelled_images_are_left_out(
    monkeypatch, devices
):
    """ReaL, section 7.1."""
    evaluator = of_labels(monkeypatch, TRUE, LOGITS, devices)
    examples = evaluator.examples(None)
    assert examples.index.tolist() == [0, 1, 2, 4, 5]
    assert examples.top1.tolist() == [True, False, True, True, False]
    assert examples.top5.all()
    # For the confusion matrix: the label that was found, else the first.
    assert examples.label.tolist() == [0, 1, 0, 3, 2]
    # The probability of a right answer is that of all true classes.
    likelihoods = [0.7, 0.2, 0.7, 0.9, 0.3]
    np.testing.assert_allclose(np.exp(-examples.nll), likelihoods, rtol=1e-5)
    results = evaluator.run(None).metrics
    assert results["top1"] == pytest.approx(3 / 5)
    assert results["nll"] == pytest.approx(-np.log(likelihoods).mean(), rel=1e-5)
    assert (results["count"], results["unlabelled"]) == (5, 1)
    assert "broken" not in results
    assert examples.labels(3) == [3, 0, 1]


def test_top_5_is_any_label_among_five(monkeypatch):
    logits = np.arange(8.0)[None].repeat(3, 0)
    source = Labelled([[7], [2, 3], [0, 1, 2]], num_classes=8)
    evaluator = of_labels(monkeypatch, source.labels, logits, 1)
    evaluator.source = source
    assert evaluator.examples(None).top5.tolist() == [True, True, False]


def test_a_split_without_any_label_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="None of 2 images of real validation is lab"):
        of_labels(monkeypatch, [[], []], LOGITS, 1).run(None)


def test_calibration_error_is_its_definition():
    """Bins ((m − 1)/M, m/M], worked by hand."""
    confidence = np.array([0.95, 0.85, 0.5, 0.45, 1.0, 0.2, 0.1])
    correct = np.array([True, False, True, False, True, False, True])
    # Five bins: 0.2, 0.1 | | 0.5, 0.45 | | 0.95, 0.85, 1.0
    gaps = abs(1 - 0.3) + abs(1 - 0.95) + abs(2 - 2.8)
    found = accuracy.expected_calibration_error(confidence, correct, 5)
    assert found == pytest.approx(gaps / 7)
    one = accuracy.expected_calibration_error(confidence, correct, 1)
    assert one == pytest.approx(abs(4 / 7 - confidence.mean()))
    sure = accuracy.expected_calibration_error(np.ones(3), np.ones(3, bool), 15)
    assert sure == 0.0


def test_calibration_error_is_there_where_asked(monkeypatch):
    results = of_labels(monkeypatch, TRUE, LOGITS, 1, ece_bins=2).run(None).metrics
    # Up to 1/2: 0.4 right, 0.3 wrong. Above: 0.7 right, wrong, right.
    assert results["ece"] == pytest.approx((abs(1 - 0.7) + abs(2 - 2.1)) / 5, rel=1e-4)
    assert "ece" not in of_labels(monkeypatch, TRUE, LOGITS, 1).run(None).metrics


def test_a_split_of_broken_images_is_an_error(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("truncated")

    monkeypatch.setattr(pipeline, "read_image", refuse)
    with pytest.raises(
        ValueError, match=r"None of 20 images could be read, e\.g\. syn"
    ):
        make(sharding.make_mesh(1), 20, 8).run(random_variables())


def test_an_unknown_type_lists_the_known():
    with pytest.raises(ValueError, match=r"evals\.x\.type 'acuracy'.*try accuracy"):
        evaluators.create({"x": {"type": "acuracy"}})


def test_an_evaluator_without_its_score_cannot_be_made():
    silent = type("Silent", (evaluators.Evaluator,), {"across": None})
    with pytest.raises(TypeError, match="abstract"):
        silent()


# --- Whose classes --------------------------------------------------------------------


def of_colours(greys, class_names, dataset, data_dir=None):
    """The scores of a model that knows the grey of each of its classes."""
    result = accuracy.Accuracy(
        predict=jax.jit(coloured.predict(greys)),
        mesh=sharding.make_mesh(1),
        loss="softmax_xent",
        image_size=(8, 8),
        dataset=dataset,
        preprocess="vision_transformer",
        batch_size=16,
        every_steps=1,
        ece_bins=0,
        num_classes=len(greys),
        class_names=class_names,
        data_dir=data_dir,
    ).run(None)
    assert result is not None
    return result


@pytest.mark.parametrize("trained", list(itertools.permutations(("ant", "bee", "cat"))))
def test_the_classes_of_the_data_are_the_models_by_name(trained, tmp_path):
    name = coloured.write_folder(tmp_path, ("ant", "bee", "cat"))
    dataset = {"name": name, "split": "all"}
    metrics, examples = of_colours(coloured.greys(trained), trained, dataset)
    assert metrics["top1"] == 1.0
    # Also where its mistakes are drawn.
    paths = [examples.source.name_of(int(i)) for i in examples.index]
    found = examples.labels(paths.index(f"{tmp_path}/bee/0.png"))
    assert [trained[k] for k in found] == ["bee"]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("names", [("dog", "cat", "bee", "ant"), ("dog", "bee")])
def test_prepared_data_may_have_the_classes_in_another_order_or_a_part(
    names, several, tmp_path
):
    name = coloured.write_prepared(tmp_path, "toys", names, several=several)
    dataset = {"name": name, "split": "test"}
    greys = coloured.greys(coloured.NAMES)
    results, _ = of_colours(greys, coloured.NAMES, dataset, str(tmp_path))
    assert (results["top1"], results["count"]) == (1.0, 4 * len(names))


@pytest.mark.parametrize("names", [None, "word {}", "{}"])
def test_a_folder_of_numbers_has_them_as_labels(names, tmp_path):
    """Such is ImageNet-v2: sorted, "10" comes before "2"."""
    greys = [20 * k for k in range(12)]
    for k, grey in enumerate(greys):
        (tmp_path / str(k)).mkdir()
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / str(k) / "0.png")
    known = names and [names.format(k) for k in range(12)]
    dataset = {"name": f"folder:{tmp_path}", "split": "all"}
    assert of_colours(greys, known, dataset).metrics["top1"] == 1.0


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"ant": "ant", "cow": "bee"}, r"all: 'cow'\.\n  Only the model: 'bee'"),
        ({"ant": "ant", "Bee": "bee"}, r"all: 'Bee'\.\n  Only the model: 'bee'"),
        (("ant", "bee", "cat"), r"Only .* all: 'cat'\.$"),
    ],
)
def test_other_classes_than_the_models_are_listed(classes, message, tmp_path):
    folder = coloured.write_folder(tmp_path, classes)
    with pytest.raises(ValueError, match=message):
        of_colours([20, 90], ("ant", "bee"), {"name": folder, "split": "all"})


# --- Which way is better --------------------------------------------------------------


def section(kind="accuracy", every_steps=5, **fields):
    return {"type": kind, "every_steps": every_steps, **fields}


SHOTS = {"kind": "fewshot", "shots": (1, 5)}


def test_the_protocol_of_predictions_is_that_of_an_evaluator_that_measures_them():
    """Few-shot evaluation has its own; it measures features."""
    evals = {"a": dict(recipe.fewshot("", "", preprocess="timm"))}
    assert evaluators.preprocess_of_predictions(evals) is None
    evals["b"] = dict(recipe.evaluation("", preprocess="big_vision"))
    assert evaluators.preprocess_of_predictions(evals) == "big_vision"
    assert evaluators.preprocess_of_predictions({}) is None


def test_an_evaluator_says_of_each_score_whether_more_is_better():
    evals = {
        "val": section(ece_bins=15),
        "a/b": section(),
        "one": section(**SHOTS, l2_exponents=(10,)),
        "sweep": section(**SHOTS, l2_exponents=(-3, 4)),
    }
    up = ("val/top1", "val/top5", "a/b/top1", "one/5shot", "sweep/1shot_l2_-3")
    down = ("val/loss", "val/nll", "val/ece", "a/b/nll")
    assert {evaluators.more_is_better(evals, name) for name in up} == {True}
    assert {evaluators.more_is_better(evals, name) for name in down} == {False}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("val/top_1", "none of the recipe's scores; try one of val/top1, "),
        ("top1", "none of the recipe's scores; try one of val/top1, "),
        ("train/loss", "try one of val/loss, "),
        ("val/count", "none of the recipe's scores"),
        ("val/broken", "none of the recipe's scores"),
        ("val/ece", "none of the recipe's scores"),
        ("shots/10shot", "try one of shots/1shot, shots/5shot"),
        ("real/top1", r"real never runs in training \(its every_steps is 0\)"),
        ("", "none of the recipe's scores"),
    ],
)
def test_what_cannot_choose_a_checkpoint_lists_what_can(name, message):
    evals = {
        "val": section(),
        "shots": section(**SHOTS, l2_exponents=(10,)),
        "real": section(every_steps=0),
    }
    with pytest.raises(ValueError, match=message):
        evaluators.more_is_better(evals, name)


def test_the_scores_are_what_the_evaluators_return(monkeypatch):
    evaluator = of_labels(monkeypatch, TRUE, LOGITS, 1, ece_bins=2)
    results = evaluator.run(None).metrics
    scores = evaluator.scores({"ece_bins": 2})
    assert results.keys() - {"count", "unlabelled", "broken"} == scores.keys()


def test_without_an_evaluator_in_training_nothing_can_be_the_best():
    with pytest.raises(ValueError, match="try one of none: no evaluator runs in tr"):
        evaluators.more_is_better({"v2": section(every_steps=0)}, "val/top1")
