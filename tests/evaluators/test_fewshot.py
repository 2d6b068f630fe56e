"""Few-shot evaluation is the closed form of section 7.2, on few images."""

import dataclasses

import coloured
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlp_mixer import evaluators, sharding
from mlp_mixer.data import pipeline, sources
from mlp_mixer.evaluators import fewshot

CLASSES = 4


def direct(x, y, num_classes, l2):
    """W by `solve`, as the section is written."""
    x = np.asarray(x, np.float64)
    mean, std = x.mean(0), x.std(0)
    design = np.hstack([(x - mean) / (std + 1e-5), np.full((len(x), 1), 100.0)])
    targets = np.where(np.arange(num_classes) == y[:, None], 1.0, -1.0)
    if len(x) < design.shape[1]:
        gram = design @ design.T + l2 * np.eye(len(x))
        weights = design.T @ np.linalg.solve(gram, targets)
    else:
        gram = design.T @ design + l2 * np.eye(design.shape[1])
        weights = np.linalg.solve(gram, design.T @ targets)
    return weights, mean, std


def direct_accuracy(x, y, test_x, test_y, num_classes, l2):
    weights, mean, std = direct(x, y, num_classes, l2)
    scaled = (np.asarray(test_x, np.float64) - mean) / (std + 1e-5)
    scores = np.hstack([scaled, np.full((len(test_x), 1), 100.0)]) @ weights
    return (scores.argmax(-1) == test_y).mean()


def clusters(n, d, seed=0):
    """Float32 features that lie around class means, one of them the same for all."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, n)
    means = np.random.default_rng(9).normal(size=(CLASSES, d))
    x = means[y] + 2.5 * rng.normal(size=(n, d))
    x[:, 0] = 3.0
    return x.astype(np.float32), y


L2 = [2.0**-10, 1, 2.0**10, 2.0**19]


@pytest.mark.parametrize("l2", L2)
@pytest.mark.parametrize(("n", "d"), [(12, 40), (40, 40), (41, 40), (300, 40), (1, 9)])
def test_ridge_regression_is_the_direct_solution(n, d, l2):
    """Fewer examples than features, as many, and more."""
    x, y = clusters(n, d)
    test_x, test_y = clusters(200, d, seed=1)
    ridge = fewshot.Ridge(x, y, CLASSES)
    weights, *_ = direct(x, y, CLASSES, l2)
    scale = np.abs(weights).max()
    np.testing.assert_allclose(ridge.weights(l2), weights, rtol=1e-6, atol=1e-7 * scale)
    expected = direct_accuracy(x, y, test_x, test_y, CLASSES, l2)
    found = ridge.accuracy(test_x, test_y, l2)
    assert found == expected
    assert isinstance(found, float)
    x, y, test_x, test_y = map(jnp.asarray, (x, y, test_x, test_y))
    on_device = fewshot.Ridge(x, y, CLASSES)
    assert on_device.accuracy(test_x, test_y, l2) == expected
    if n > 100 and l2 == 1:  # neither chance nor a trivial set
        assert 0.5 < expected < 1


def test_large_test_sets_are_scored_in_parts(monkeypatch):
    (x, y), (test_x, test_y) = clusters(30, 8), clusters(50, 8, seed=1)
    ridge = fewshot.Ridge(x, y, CLASSES)
    whole = ridge.accuracy(test_x, test_y, 1.0)
    monkeypatch.setattr(fewshot, "_ROWS", 7)
    assert ridge.accuracy(test_x, test_y, 1.0) == whole


def test_impossible_regressions_are_refused():
    x, y = clusters(10, 4)
    with pytest.raises(ValueError, match="l2 is 0; it must be above 0"):
        fewshot.Ridge(x, y, CLASSES).weights(0)
    for wrong in (-1, CLASSES):
        with pytest.raises(ValueError, match=r"expected some of 0 … 3"):
            fewshot.Ridge(x, np.full(10, wrong), CLASSES)


def test_shots_are_one_permutation_per_class():
    labels = np.array([1, 0, 1, 1, 0, 3])
    rng = np.random.default_rng(5)
    expected = [rng.permutation([1, 4]), rng.permutation([0, 2, 3]), [], [5]]
    for found, wanted in zip(
        fewshot.permuted_by_class(labels, CLASSES, 5), expected, strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    plain = fewshot.permuted_by_class(labels, CLASSES, None)
    assert [p.tolist() for p in plain] == [[1, 4], [0, 2, 3], [], [5]]


def test_one_l2_is_chosen_for_all_data_sets():
    results = {
        "a": {"5shot_l2_-1": 0.5, "5shot_l2_0": 0.6, "5shot_l2_3": 0.4},
        "b": {"5shot_l2_-1": 0.9, "5shot_l2_0": 0.5, "10shot_l2_3": 0.7, "count": 3},
        "c": {"5shot": 0.8, "top1": 0.5},
    }
    assert fewshot.choose_l2(results) == {
        "a": {"5shot": 0.5, "5shot_l2": 0.5},
        "b": {"5shot": 0.9, "5shot_l2": 0.5, "10shot": 0.7, "10shot_l2": 8.0},
    }
    with pytest.raises(ValueError, match="l2_exponents of a, b have none in common"):
        fewshot.choose_l2({"a": {"1shot_l2_1": 0.1}, "b": {"1shot_l2_2": 0.1}})


# --- The evaluator --------------------------------------------------------------------


@dataclasses.dataclass
class Listed:
    """Image i has the value `first + i` everywhere; the broken ones cannot be read."""

    labels: np.ndarray
    first: int
    broken: tuple[int, ...] = ()
    read: list[int] = dataclasses.field(default_factory=list)
    num_classes: int = CLASSES
    class_names = None
    multi_label: bool = False

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.broken:
            raise ValueError("truncated")
        image = np.full((8, 8, 3), self.first + index, np.uint8)
        return {"image": image, "label": self.label(index)}

    def label(self, index):
        return int(self.labels[index])

    def name_of(self, index):
        return f"<{self.first + index}>"


TRAIN_X, TRAIN_Y = clusters(90, 6)
TEST_X, TEST_Y = clusters(75, 6, seed=1)


def make(monkeypatch, devices=1, train=None, test=None, **fields):
    """An evaluator of a model whose features of image i are row i of a table."""
    splits = {
        "train": Listed(TRAIN_Y, 0) if train is None else train,
        "test": Listed(TEST_Y, 90) if test is None else test,
    }
    monkeypatch.setattr(sources, "open_source", lambda name, split, **_: splits[split])
    table = jnp.asarray(np.concatenate([TRAIN_X, TEST_X]))

    def predict(variables, batch):
        index = batch["image"][:, 0, 0, 0].astype(int)
        features = variables * table[index]
        return {"logits": jnp.zeros((len(index), 3)), "pre_logits": features}

    section = {
        "type": "fewshot",
        "train": {"name": "pets", "split": "train"},
        "test": {"name": "pets", "split": "test"},
        "shots": (1, 5),
        "seeds": 3,
        "l2_exponents": (10,),
        "preprocess": "paper-resize-crop",
        "batch_size": 16,
        "every_steps": 7,
    }
    (evaluator,) = evaluators.create(
        {"pets": section | fields},
        predict=jax.jit(predict),
        mesh=sharding.make_mesh(devices),
        image_size=(8, 8),
        data_dir=None,
    ).values()
    return evaluator, splits


ONE = jnp.float32(1.0)


def expected(shots, seed, l2, without=(), kept=slice(None)):
    chosen = [
        i
        for positions in fewshot.permuted_by_class(TRAIN_Y, CLASSES, seed)
        for i in positions[:shots]
        if i not in without
    ]
    x, y = TRAIN_X[chosen], TRAIN_Y[chosen]
    return direct_accuracy(x, y, TEST_X[kept], TEST_Y[kept], CLASSES, l2)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_score_is_the_mean_over_seeds_of_the_direct_solutions(monkeypatch, devices):
    evaluator, splits = make(monkeypatch, devices)
    results = evaluator.run(ONE).metrics
    assert results == {
        "1shot": pytest.approx(np.mean([expected(1, s, 1024) for s in range(3)])),
        "5shot": pytest.approx(np.mean([expected(5, s, 1024) for s in range(3)])),
        "count": 75,
    }
    assert 0.25 < results["1shot"] < results["5shot"] < 1
    assert (evaluator.every_steps, evaluator.data) == (7, "pets train → test")
    # Only images that are needed are read, each once.
    needed = {
        i
        for seed in range(3)
        for positions in fewshot.permuted_by_class(TRAIN_Y, CLASSES, seed)
        for i in positions[:5]
    }
    assert len(needed) < 90
    assert sorted(splits["train"].read) == sorted(needed)
    assert sorted(splits["test"].read) == list(range(75))


def test_the_sweep_draws_the_first_shots_and_reports_every_l2(monkeypatch):
    evaluator, _ = make(monkeypatch, seeds=0, l2_exponents=(-10, 0, 19))
    results = evaluator.run(ONE).metrics
    assert len(results) == 2 * 3 + 1
    for shots in (1, 5):
        for exponent in (-10, 0, 19):
            found = results[f"{shots}shot_l2_{exponent}"]
            assert found == pytest.approx(expected(shots, None, 2.0**exponent))


def test_broken_images_are_left_out_and_counted(monkeypatch, caplog):
    first = fewshot.permuted_by_class(TRAIN_Y, CLASSES, 0)[2][0]
    train = Listed(TRAIN_Y, 0, broken=(first,))
    evaluator, _ = make(
        monkeypatch, 8, train, Listed(TEST_Y, 90, broken=(3, 74)), seeds=1, shots=(5,)
    )
    results = evaluator.run(ONE).metrics
    assert (results["count"], results["broken"]) == (73, 3)
    assert f"<{first}>" in caplog.text
    kept = np.delete(np.arange(75), (3, 74))
    found = expected(5, 0, 1024, without={first}, kept=kept)
    assert results["5shot"] == pytest.approx(found)


def test_a_record_without_a_readable_label_is_no_shot(monkeypatch, caplog):
    class Damaged(Listed):
        def label(self, index):
            if index == 8:
                raise ValueError("damaged record")
            return super().label(index)

    evaluator, splits = make(monkeypatch, train=Damaged(TRAIN_Y, 0), shots=(90,))
    assert evaluator.run(ONE).metrics["broken"] == 1
    assert 8 not in splits["train"].read
    assert "Broken image <8>: damaged record" in caplog.text


def test_classes_with_too_few_examples_give_what_they_have_and_it_is_said_once(
    monkeypatch, caplog
):
    evaluator, _ = make(monkeypatch, shots=(5, 1000), seeds=1)
    again = [evaluator.run(ONE).metrics for _ in range(2)]
    assert again[0] == again[1]
    everything = direct_accuracy(TRAIN_X, TRAIN_Y, TEST_X, TEST_Y, CLASSES, 1024)
    assert again[0]["1000shot"] == pytest.approx(everything)
    assert caplog.text.count("4 of 4 classes have fewer than 1000 examples") == 1


def test_a_stop_ends_it_anywhere_without_a_result(monkeypatch):
    evaluator, _ = make(monkeypatch)
    asked = []

    def count():
        asked.append(True)
        return False

    assert evaluator.run(ONE, count)
    total = len(asked)
    assert total > 5 + 6  # batches of the test split, and regressions
    for last in (1, total // 2, total):
        left = iter([False] * (last - 1) + [True])
        assert evaluator.run(ONE, lambda left=left: next(left)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shots": ()}, r"shots is empty; try one number, \(10,\)"),
        ({"l2_exponents": ()}, "l2_exponents is empty"),
        ({"shots": (0, 5)}, r"shots are \(0, 5\)"),
        ({"seeds": -1}, "seeds is -1"),
        (
            {"test": Listed(TEST_Y, 90, num_classes=5)},
            "pets test has 5 classes, but pets train 4",
        ),
        ({"train": Listed(TRAIN_Y, 0, multi_label=True)}, "one label per image"),
    ],
)
def test_impossible_sections_are_refused_at_once(monkeypatch, fields, message):
    with pytest.raises(ValueError, match=message):
        make(monkeypatch, **fields)


def test_features_are_of_the_protocol(monkeypatch):
    seen = []
    batches = pipeline.eval_batches

    def recorded(source, *, preprocess, **options):
        seen.append(preprocess)
        return batches(source, preprocess=preprocess, **options)

    monkeypatch.setattr(pipeline, "eval_batches", recorded)
    make(monkeypatch, preprocess="timm")[0].run(ONE)
    assert seen == ["timm", "timm"]


def on_colours(train, test, split="all", data_dir=None):
    """Its score, where a feature is the colour."""
    evaluator = fewshot.FewShot(
        predict=jax.jit(coloured.predict([0.0])),
        mesh=sharding.make_mesh(1),
        image_size=(8, 8),
        train={"name": train, "split": split},
        test={"name": test, "split": split},
        shots=(4,),
        seeds=1,
        l2_exponents=(-10,),
        preprocess="vision_transformer",
        batch_size=16,
        every_steps=1,
        data_dir=data_dir,
    )
    result = evaluator.run(None)
    assert result is not None
    results = result.metrics
    scores = evaluator.scores({"shots": (4,), "l2_exponents": (-10,)})
    assert scores.keys() == results.keys() - {"count"}
    return results["4shot"]


def test_the_test_splits_classes_are_the_shots_by_name(tmp_path):
    """Sorted, "e" and an accent come before "f", and "é" behind it."""
    mac = coloured.write_folder(tmp_path / "mac", {"e\u0301": "ant", "f": "bee"})
    other = coloured.write_folder(tmp_path / "other", {"\u00e9": "ant", "f": "bee"})
    for pair in ((mac, other), (other, mac), (mac, mac)):
        assert on_colours(*pair) == 1.0


def test_prepared_shots_and_a_permuted_test_set_agree_by_name(tmp_path):
    coloured.write_prepared(tmp_path, "toys", ("cat", "ant"))
    coloured.write_prepared(tmp_path, "others", ("ant", "cat"))
    assert on_colours("toys", "others", "test", str(tmp_path)) == 1.0


@pytest.mark.parametrize("called", ["cow", "Bee"])
def test_another_class_in_the_test_split_is_named(called, tmp_path):
    train = coloured.write_folder(tmp_path / "train", ("ant", "bee"))
    test = coloured.write_folder(tmp_path / "test", {"ant": "ant", called: "bee"})
    message = f"(?s)Only .*test all: '{called}'.*train all: 'bee'"
    with pytest.raises(ValueError, match=message):
        on_colours(train, test)
