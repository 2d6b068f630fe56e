"""Prepares data sets by name, from their official files to array_record.

python -m mlp_mixer.prepare imagenet2012 --manual_dir=/where/the/tars/are
"""

import pathlib

from absl import flags

from mlp_mixer import console, program
from mlp_mixer.data import preparation


def show(data_dir: pathlib.Path, manual_dir: pathlib.Path) -> None:
    """Prints what can be prepared, what that needs, and what is there."""
    rows = []
    for name, recipe in preparation.PREPARABLE.items():
        needs = [recipe.manual, recipe.base, "TensorFlow" * recipe.tensorflow]
        there = preparation.find(name, data_dir)
        rows.append(
            [
                name,
                "; ".join(filter(None, needs)),
                f"{recipe.gigabytes:,g} GB",
                there.name if there else "",
            ]
        )
    console.Table(
        f"Files to be put by hand: {manual_dir}. Any other name of TFDS works too.",
        ["data set", "needs", "disk", "prepared"],
        rows,
    ).show()


def main(arguments: list[str]) -> None:
    """The command line."""
    data_dir = flags.FLAGS.data_dir or preparation.default_data_dir()
    manual_dir = flags.FLAGS.manual_dir or preparation.default_manual_dir(data_dir)
    if arguments in ([], ["list"]):
        show(pathlib.Path(data_dir), pathlib.Path(manual_dir))
        return
    for name in arguments:
        preparation.prepare(
            name, data_dir=data_dir, manual_dir=manual_dir, verify=flags.FLAGS.verify
        )


if __name__ == "__main__":
    program.define_path(
        "data_dir",
        None,
        "Where TFDS data lives; its own default (TFDS_DATA_DIR, or "
        "~/tensorflow_datasets) if not set.",
    )
    program.define_path(
        "manual_dir",
        None,
        "Where files lie that a person has to download; DATA_DIR/downloads/manual if "
        "not set.",
    )
    flags.DEFINE_boolean(
        "verify", True, "Whether to compare them with their published checksums."
    )
    program.run(main, compiles=False)
