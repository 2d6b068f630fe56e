"""Trains a model from a recipe.

    python -m mlp_mixer.train --config=configs/mixer_b16.py

The same command again resumes the run, on any number of devices. A run lives in one
folder (`runs/<recipe>` by default): config.json, class_names.json, data.json,
metrics.jsonl, saved.json, tensorboard/, checkpoints/; owner.json while it trains.
"""

from mlp_mixer import supervisor

if __name__ == "__main__":  # before the imports that take seconds
    supervisor.supervise(saves=True)

import functools
import logging
import os
import sys

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from mlp_mixer import (
    checkpoint,
    evaluators,
    experiment,
    goodput,
    metrics,
    pretrained,
    processes,
    program,
    recipe,
    runs,
    sharding,
    shipped,
    signals,
    steps,
)
from mlp_mixer.data import pipeline, sources
from mlp_mixer.workdir import claimed, load

logger = logging.getLogger(__name__)


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    data_dir: str | None = None,
    profile: str | None = None,
    accept_changed_data: bool = False,
    stop_after: float | None = None,
    seconds_before: float = 0.0,
) -> steps.TrainState:
    """Runs `config` to its last step, evaluating and checkpointing on the way.

    Args:
      config: the recipe.
      workdir: folder of the run; what it holds is resumed.
      data_dir: where data sets are; TFDS's own folder by default.
      profile: "START:STOP", steps of which a trace is written.
      accept_changed_data: whether a run goes on with other data than it began with, of
        the same classes.
      stop_after: number of seconds since the start of the process, after which the run
        saves and stops.
      seconds_before: number of seconds that the process took to come here, which count
        as the run's.

    Returns:
      The state after the last update, or after the one at which the process was asked
      to stop (SIGTERM, SIGINT, or the end of its time).
    """
    clock = goodput.Clock(seconds_before)
    # Descriptions: nothing is on a device yet.
    workdir = epath.Path(workdir).expanduser()
    with processes.together():
        recipe.check_fields(config)
        mesh = sharding.make_mesh(**config.mesh)
        sharding.check_batch(mesh, config.batch_size, config.accumulate)
        experiment.create_model(config, mesh)  # a wrong one, before data is opened
        size = config.model.image_size
        source = sources.open_source(
            **config.dataset, data_dir=data_dir, image_size=size
        )
        config = recipe.completed(config, len(source), source.num_classes)
        best = config.checkpoint.keep_best
        more_is_better = best is None or evaluators.more_is_better(
            config.evals.to_dict(), best
        )
        total_steps = recipe.total_steps(config)
        evaluators.warn_if_only_the_last_is_measured(config, total_steps)
        data = sources.fingerprint(source)
        accept = {"accept_changed_data": accept_changed_data}
        source = runs.training_data(source, config, workdir, data, **accept)
        profiler = metrics.Profiler(workdir, profile, total_steps=total_steps)
        example = pipeline.example(size)
        model, tx, schedule, target, train_step, predict = experiment.build(
            config, mesh, example, total_steps
        )
        evals = evaluators.create(
            evaluators.sections(config, class_names=source.class_names),
            predict=predict,
            mesh=mesh,
            image_size=size,
            data_dir=data_dir,
        )
    runs.check_agreement(config, data, evals)

    with (
        clock,
        claimed(config, workdir, source.class_names, data, **accept) as (
            note_saved,
            check_owned,
        ),
        checkpoint.Checkpointer(
            f"{workdir}/checkpoints",
            **config.checkpoint,
            clock_every_steps=config.log_every_steps,
            more_is_better=more_is_better,
            stop_after=stop_after,
        ) as checkpointer,
    ):
        # State: the newest good checkpoint, else a fresh start, from weights or none.
        state = checkpointer.restore(target)
        if state is None:
            given = pretrained.initial(
                config.init_from,
                model,
                target,
                image_size=size,
                head=config.init_head,
                resize_by=config.init_resize,
                class_names=source.class_names,
            )
            state = steps.init_state(
                model, tx, target, example, seed=config.seed, **given
            )
        first_step = int(state.step)
        logger.info(
            "%s: %s of %s, %s parameters, from step %d to %d on %d %s device(s)",
            workdir,
            config.model.name,
            config.dataset.name,
            f"{sum(x.size for x in jax.tree.leaves(state.params)):,}",
            first_step,
            total_steps,
            mesh.size,
            jax.default_backend(),
        )
        logger.info("It is computed in %s.", model.run)
        batches = pipeline.train_batches(
            source,
            **config.input,
            image_size=size,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=first_step,
            rows=sharding.process_rows(mesh, config.batch_size),
        )
        with metrics.Writer(
            workdir,
            first_step=first_step,
            total_steps=total_steps,
            batch_size=config.batch_size,
            every_steps=config.log_every_steps,
            learning_rate=schedule,
            last_good=checkpointer.latest_step,
            clock=clock,
        ) as writer:
            # At first_step no update is due, only evaluations that a stop cut off.
            for step in range(first_step, total_steps + 1):
                last = step == total_steps
                if step > first_step:
                    profiler.before(step)
                    with clock.doing("input"):
                        batch = sharding.place_rows(next(batches), mesh)
                    with clock.doing("steps"):
                        state, scalars = train_step(state, batch)
                    writer.train(step, scalars)
                    profiler.after(step, last, scalars)

                stop = functools.partial(checkpointer.stop_requested, step)
                stopping = False
                results: dict[str, float] = {}
                for name, evaluator in evals.items():
                    if stopping or not writer.is_due(step, name, evaluator.every_steps):
                        continue
                    writer.flush()
                    with clock.doing("evaluation"):
                        asked = stop()
                        variables = state.averaged if evaluator.ema else state.variables
                        result = None if asked else evaluator.run(variables, stop)
                    if result is None:
                        stopping = True
                        continue
                    scores = result.metrics
                    named = {f"{name}/{k}": v for k, v in scores.items()}
                    results |= named
                    if step == first_step:
                        checkpointer.add_metrics(step, named)
                    writer.evaluation(step, name, scores)

                if step > first_step:
                    stopping = stopping or (stop() and not last)
                    if last or stopping or checkpointer.due(step):
                        # A state that is not finite must not become a checkpoint.
                        check_owned()
                        writer.store()
                        with clock.doing("checkpoint"):
                            checkpointer.save(
                                step, state, results, force=last or stopping
                            )
                note_saved(checkpointer.complete_step())
                if stopping:
                    break
            with clock.doing("checkpoint"):
                checkpointer.wait()
            note_saved(checkpointer.complete_step())
            if stopping:
                logger.info(
                    "Stopped after step %d; the same command goes on from there.", step
                )
            else:
                logger.info("%s is trained to step %d.", workdir, total_steps)
    return state


def main(arguments: list[str]) -> None:
    """The command line."""
    program.check_no_words(arguments)
    folder = flags.FLAGS.workdir or shipped.default_workdir(sys.argv)
    state = train(
        flags.FLAGS.config,
        folder,
        data_dir=flags.FLAGS.data_dir,
        profile=flags.FLAGS.profile,
        accept_changed_data=flags.FLAGS.accept_changed_data,
        stop_after=flags.FLAGS.stop_after,
        seconds_before=signals.seconds_since_start(),
    )
    steps_left = recipe.total_steps(load(folder)) - int(state.step)
    if flags.FLAGS.stop_after is not None and steps_left:
        sys.exit(os.EX_TEMPFAIL)  # a job script starts it again


if __name__ == "__main__":
    program.define_recipe()
    program.define_path("workdir", None, "Folder of the run; runs/<recipe> if not set.")
    program.define_path("data_dir", None, "Folder of data sets; TFDS's own if not set.")
    flags.DEFINE_string("profile", None, "START:STOP: steps to write a trace of.")
    flags.DEFINE_bool(
        "accept_changed_data", False, "Go on with other data of the same classes."
    )
    program.define_duration(
        "stop_after",
        None,
        "Time since the start, e.g. 3h50m, after which the run saves and stops; with "
        f"this flag the exit status is {os.EX_TEMPFAIL} whenever steps are left.",
    )
    program.run(main, distributed=True)
