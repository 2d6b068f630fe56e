"""The folder of a run: its recipe, its classes and its data, written and compared.

A run's folder explains itself. config.json is its recipe with every field resolved,
class_names.json the names of its classes by label, data.json what its training data is.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from mlp_mixer import fields, files, history, models, ownership, processes, recipe
from mlp_mixer.data import class_names as naming
from mlp_mixer.text import listed, printable

logger = logging.getLogger(__name__)


# Fields that may change between two starts of one run: they do not change results,
# up to the order of float additions, or only what is looked at and kept. `accumulate`
# also changes which dropout is drawn and, in a model with BatchNorm, which images are
# normalised together: there `check_same` refuses it.
MAY_CHANGE = (
    "mesh",
    "sharding",
    "accumulate",
    "input.workers",
    "run.scan",
    "run.remat",
    "run.images_at_once",
    "log_every_steps",
    "evals",
    "checkpoint",
)


def load(workdir: epath.PathLike) -> ConfigDict:
    """Returns the recipe of the run in `workdir`, as `recipe.from_json` does.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: config.json is damaged, holds no recipe, or has a later format.
    """
    path = epath.Path(workdir).expanduser() / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} holds no run (no config.json). Name a folder that "
            "`python -m mlp_mixer.train` has written, e.g. --workdir=runs/digits."
        )
    return recipe.from_json(files.read_json(path), printable(os.fspath(path)))


def load_class_names(
    workdir: epath.PathLike, count: int | None = None
) -> list[str] | None:
    """The names of the classes of the run in `workdir`, if its data set has names.

    Raises:
      FileNotFoundError: class_names.json is not there.
      ValueError: it is damaged, or has other than `count` names.
    """
    return naming.of_run(epath.Path(workdir) / "class_names.json", count)


@contextlib.contextmanager
def claimed(
    config: ConfigDict, workdir: epath.PathLike, *more: Any, **options: Any
) -> Iterator[tuple[Callable[[int | None], None], Callable[[], None]]]:
    """Owns the folder of a run until the end of the block, and claims it as `claim`.

    Yields:
      `note_saved(step)`, to be called with the newest step that is saved; and
      `check_owned()`, to be called before a save, see `ownership.owned`.

    Raises:
      OwnedError: another process trains there.
      FileNotFoundError: a part of the run there is missing.
      ValueError: another recipe's run, or the processes see different folders.
    """
    with ownership.owned(workdir) as check_owned:
        saved = None
        with processes.together():
            if jax.process_index() == 0:
                saved = claim(config, workdir, *more, **options)
        yield saved.note if saved else lambda _: None, check_owned


def claim(
    config: ConfigDict,
    workdir: epath.PathLike,
    class_names: Sequence[str] | None = None,
    data: dict[str, Any] | None = None,
    *,
    accept_changed_data: bool = False,
) -> history.Saved:
    """Writes what a run is to `workdir`, or checks that it is the one there.

    That is the resolved recipe; the names of its classes, which stay as they are once
    the run has begun; and what its training data is.

    Args:
      config: with every field resolved.
      class_names: names of the training data's classes, by label.
      data: `sources.fingerprint` of the training data; None: it is not recorded.
      accept_changed_data: whether other data of the same classes is accepted.

    Returns:
      The record of saved steps; its `note` writes one.

    Raises:
      FileNotFoundError: a part of the run that is there is missing.
      ValueError: the run there has another recipe, other classes or other data.
    """
    check_run(config, workdir, data, accept_changed_data=accept_changed_data)
    folder = epath.Path(workdir)
    begun = history.has_begun(workdir)
    naming.places(class_names, trained_classes(workdir), **sides(config, workdir))
    folder.mkdir(parents=True, exist_ok=True)
    new: dict[str, Any] = {"config": recipe.to_json(config)}
    if not begun or not (folder / "class_names.json").exists():
        new["class_names"] = class_names
    if data is not None:
        new["data"] = data
        if begun:
            _log_changed_data(workdir, _recorded_data(folder), data)
    for name, content in new.items():
        files.write_json(folder / f"{name}.json", content)
    return history.Saved(workdir)


def check_run(
    config: ConfigDict,
    workdir: epath.PathLike,
    data: dict[str, Any] | None = None,
    *,
    accept_changed_data: bool = False,
) -> None:
    """Passes if `workdir` holds no result, or a run of this recipe and data.

    Args:
      config: with every field resolved.
      data: `sources.fingerprint` of the training data; None: it is not compared.
      accept_changed_data: whether other examples of the same classes are no error.

    Raises:
      FileNotFoundError: a part of the run is missing.
      ValueError: another recipe's run, lists the fields that differ; or its training
        data has changed, says how.
    """
    check_recipe(config, workdir, data, accept_changed_data)
    folder = epath.Path(workdir)
    recorded = _recorded_data(folder) if history.has_begun(workdir) else None
    if recorded is None or data is None or accept_changed_data:
        return
    if changed := changes(recorded, data):
        raise ValueError(
            f"The training data of {workdir} has changed:\n  "
            + "\n  ".join(changed)
            + "\nBring the old data back, choose another --workdir, or go on with the "
            "new data: --accept_changed_data."
        )


def check_recipe(
    config: ConfigDict,
    workdir: epath.PathLike,
    data: dict[str, Any] | None,
    accept_changed_data: bool,
    may_change: Sequence[str] = (),
) -> None:
    """Passes unless a run of another recipe has begun in `workdir`: see `check_run`.

    Args:
      config, data, accept_changed_data: as in `check_run`.
      may_change: fields that are not compared, besides `MAY_CHANGE`.
    """
    folder = epath.Path(workdir)
    if not history.has_begun(workdir):
        return
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{workdir} holds a run, but its config.json is missing, which says of "
            "which recipe. Bring it back, or choose another --workdir."
        )
    there = load(workdir)
    history.check_kept(workdir, there.checkpoint.every_steps)
    may_change = (*MAY_CHANGE, *may_change)
    if accept_changed_data or (data is not None and _recorded_data(folder)):
        # The fingerprints say it better: of each class, or each shard.
        may_change = (*may_change, "dataset.num_examples")
    check_same(there, config, workdir, may_change)


def check_same(
    there: ConfigDict,
    config: ConfigDict,
    workdir: epath.PathLike,
    may_change: Sequence[str],
) -> None:
    """Passes if a recipe is that of the run in `workdir`.

    Args:
      there, config: the run's recipe and another one, with every field resolved.
      may_change: fields that are not compared.

    Raises:
      ValueError: they differ; lists the fields.
    """
    hint = ""
    if there.accumulate != config.accumulate and _has_statistics(config):
        may_change = [field for field in may_change if field != "accumulate"]
        hint = (
            " In a model with BatchNorm accumulate changes which images are normalised "
            "together; --config.run.remat=full saves memory and changes no result."
        )
    pair = recipe.to_json(there), recipe.to_json(config)
    if differing := _differences(*pair, may_change):
        raise ValueError(
            f"{workdir} holds a run of another recipe:\n"
            + listed(differing, 17)
            + f"\nChoose another --workdir, or give the fields their old values.{hint}"
        )


def _has_statistics(config: ConfigDict) -> bool:
    """Whether the model has more than parameters: BatchNorm's running statistics."""
    model = models.create(**config.model)
    image = jnp.zeros((1, *config.model.image_size, 3))
    return jax.eval_shape(model.init, jax.random.key(0), image).keys() != {"params"}


def trained_classes(workdir: epath.PathLike) -> list[str] | None:
    """The names of the classes of a run that has begun, if they have names."""
    folder = epath.Path(workdir)
    if not (folder / "class_names.json").exists() or not history.has_begun(workdir):
        return None
    return load_class_names(workdir)


def sides(config: ConfigDict, workdir: epath.PathLike) -> dict[str, str]:
    """What to call the training data and the run where their classes differ."""
    return {
        "of": f"{config.dataset.name} {config.dataset.split}",
        "to": f"the run in {workdir}",
        "hint": "Give the classes their old names, or choose another --workdir.",
    }


def _recorded_data(folder: epath.Path) -> dict[str, Any] | None:
    """The fingerprint of a run's training data; None of a run of an older version."""
    path = folder / "data.json"
    if not path.exists():
        return None
    return files.read_json(path)


def _log_changed_data(
    workdir: epath.PathLike, recorded: dict[str, Any] | None, data: dict[str, Any]
) -> None:
    if recorded is None:
        logger.info(
            "%s does not say what its training data was, so that cannot be compared; "
            "from now on it does.",
            workdir,
        )
    elif changed := changes(recorded, data):
        listing = "\n  ".join(changed)
        logger.warning("%s goes on with changed data:\n  %s", workdir, listing)


def _differences(there: Any, here: Any, may_change: Sequence[str]) -> list[str]:
    """Lines for people: the fields of two recipes' `recipe.to_json` that differ."""
    before, now = dict(fields.flat(there)), dict(fields.flat(here))
    return [
        f"{key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "absent") != now.get(key, "absent")
        and not any(key == m or key.startswith(f"{m}.") for m in may_change)
    ]


def changes(before: dict[str, Any], now: dict[str, Any], limit: int = 12) -> list[str]:
    """Lines for people: what differs in two fingerprints, but for the classes' order.

    Classes are compared by name elsewhere: see `sources.with_classes`.
    """
    lines = []
    for key in [*before, *(key for key in now if key not in before)]:
        there, here = before.get(key), now.get(key)
        if there == here or key in ("class_names", "order"):
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            lines += [
                f"{printable(name)}: {_in_words(there.get(name))} there, "
                f"{_in_words(here.get(name))} here"
                for name in sorted(there.keys() | here.keys())
                if there.get(name) != here.get(name)
            ]
        else:
            lines.append(f"{key}: {_in_words(there)} there, {_in_words(here)} here")
    if not lines and before.get("order") != now.get("order"):
        lines.append("the same files, in another order")
    more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    return lines[:limit] + more


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{v} {k}" if k != "files" else f"{k} {v}" for k, v in value.items()
        )
    return "nothing" if value is None else printable(str(value))[:100]
