"""Fine-tunes as the paper does: chooses the learning rate, then trains several times.

    python scripts/sweep.py --config=configs/finetune/cifar10.py:l16 --data_dir=DATA
    python scripts/sweep.py --config=configs/finetune/imagenet2012.py \\
        --config=configs/finetune/cifar10.py --config=configs/finetune/cifar100.py \\
        --config=configs/finetune/pets.py --config=configs/finetune/flowers.py

For each recipe, its grid of learning rates on the part of training that the word
`select` leaves, the best by top-1 on the rest; then all of training with that rate, a
run for each seed, evaluated on the test split. The five sets together give the paper's
"Avg 5". Writes sweep.md, sweep.json and sweep.png to --workdir.

Each run is an ordinary run in a folder of its own. The same command goes on where it
was stopped and repeats nothing that is finished; with more seeds or rates, it adds
them. Fields change as in training: --config.accumulate=8. One process, any number of
devices.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence

import arguments

from mlp_mixer import compilation_cache, console, program, sweep


def parser(doc: str | None, workdir: str) -> argparse.ArgumentParser:
    """The options that all sweeps have."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    path, count = arguments.path, arguments.whole(1)
    p.add_argument(
        "--workdir", type=path, default=workdir, help="of all runs (%(default)s)"
    )
    p.add_argument("--seeds", type=count, default=3, help="final runs (%(default)s)")
    p.add_argument(
        "--data_dir", type=path, help="folder of data sets; TFDS's own if not set"
    )
    p.add_argument("--init_from", help="weights to start from, instead of the recipe's")
    p.add_argument(
        "--learning_rates", type=_rates, help="0.003,0.01; one: nothing is chosen"
    )
    p.add_argument(
        "--drop_checkpoints",
        action="store_true",
        help="delete those of a finished run of the grid",
    )
    return p


def _rates(text: str) -> tuple[float, ...]:
    return tuple(map(arguments.real(1e-30), text.split(",")))


def parse(
    p: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the `--config.field=value` among `argv`."""
    args, rest = p.parse_known_args(argv)
    if wrong := [word for word in rest if not word.startswith("--config.")]:
        p.error(f"unknown: {' '.join(wrong)}; fields are --config.FIELD=VALUE")
    if wrong := [word for word in rest if "=" not in word]:
        p.error(f"{' '.join(wrong)}: write --config.FIELD=VALUE")
    for field, instead in (
        ("optim.learning_rate", "--learning_rates"),
        ("seed", "--seeds"),
    ):
        if any(word.startswith(f"--config.{field}=") for word in rest):
            p.error(f"config.{field} is what a sweep varies; give {instead}")
    if args.init_from is not None:
        rest.append(f"--config.init_from={args.init_from}")
    return args, rest


def run_all(
    tasks: Sequence[sweep.Task],
    args: argparse.Namespace,
    means: sweep.Means = sweep.average_5,
) -> None:
    """Runs the tasks with the options of `parser`."""
    sweep.run_all(
        tasks,
        pathlib.Path(args.workdir),
        seeds=args.seeds,
        data_dir=args.data_dir,
        drop_checkpoints=args.drop_checkpoints,
        means=means,
    )


def start(main: Callable[[list[str]], None]) -> None:
    """Runs `main(arguments)` as a program does."""
    console.log_to_terminal()
    with program.errors_in_one_line("sweep"):
        compilation_cache.keep_programs(None)
        main(sys.argv[1:])


def main(argv: list[str]) -> None:
    """The command line."""
    p = parser(__doc__, "runs/sweep")
    p.add_argument(
        "--config", action="append", required=True, help="a recipe; any number"
    )
    args, overrides = parse(p, argv)
    rates = args.learning_rates
    run_all([sweep.open_task(value, overrides, rates) for value in args.config], args)


if __name__ == "__main__":
    start(main)
