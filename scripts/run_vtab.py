"""The 19 tasks of VTAB-1k, each as `scripts/sweep.py` does it, and their mean.

    python scripts/run_vtab.py --words=l16,448 --data_dir=DATA
    python scripts/run_vtab.py --words=b16,hyperrule --tasks=svhn,dtd

Words are those of configs/finetune/vtab.py; 448 is for the tasks with large images, as
in the paper's Table 2. The rate of each task is chosen on its 200 held-out images.
Stopped, the same command goes on.
"""

import statistics
from collections.abc import Sequence

import sweep as command

from mlp_mixer import recipe, shipped, sweep

RECIPE = "configs/finetune/vtab.py"


def tasks_of(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The tasks to run: all, or those of `names`, in the recipe's order.

    Raises:
      ValueError: an unknown one.
    """
    given = recipe.words(",".join(names), known)
    return [task for task in known if not given or task in given]


def config_of(task: str, words: Sequence[str], small: Sequence[str]) -> str:
    """The recipe of a task: without 448 if its images are small."""
    kept = [word for word in words if not (word == "448" and task in small)]
    return f"{RECIPE}:{','.join([task, *kept])}"


def means(results: Sequence[sweep.Result], groups: dict[str, str]) -> dict[str, float]:
    """The mean of each group that is complete, and of all.

    Args:
      results: results on data sets `vtab_<task>`.
      groups: task → group, of all 19.
    """
    found = {result.dataset.removeprefix("vtab_"): result.mean for result in results}
    members = {"VTAB-1k": list(groups)}
    for task, group in groups.items():
        members.setdefault(f"VTAB-1k {group}", []).append(task)
    return {
        f"{name}, mean of {len(tasks)}": statistics.fmean(found[t] for t in tasks)
        for name, tasks in members.items()
        if found.keys() >= set(tasks)
    }


def main(argv: list[str]) -> None:
    """The command line."""
    p = command.parser(__doc__, "runs/vtab")
    p.add_argument("--words", default="", help="of the recipe: l16,448")
    p.add_argument("--tasks", default="", help="some of them: svhn,dtd; all if not set")
    args, overrides = command.parse(p, argv)
    defined = recipe.run_file(shipped.find(RECIPE)[0])
    classes_and_groups = defined["TASKS"]
    names = tasks_of(args.tasks.split(","), list(classes_and_groups))
    words = [word.strip() for word in args.words.split(",") if word.strip()]
    tasks = [
        sweep.open_task(
            config_of(name, words, defined["SMALL"]), overrides, args.learning_rates
        )
        for name in names
    ]
    groups = {task: group for task, (_, group) in classes_and_groups.items()}
    command.run_all(tasks, args, lambda results: means(results, groups))


if __name__ == "__main__":
    command.start(main)
