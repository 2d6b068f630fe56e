"""One process: checkpoint_worker.py MODE DIRECTORY INDEX COUNT DEVICES PORT"""

import logging
import os
import pathlib
import resource
import signal
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax

mode, directory = sys.argv[1:3]
index, count, devices, port = map(int, sys.argv[3:])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", devices)
jax.distributed.initialize(f"localhost:{port}", count, index)

import test_checkpoint as cases  # noqa: E402

from mlp_mixer.checkpoint import Checkpointer, CheckpointError  # noqa: E402

logging.basicConfig(level=logging.INFO)
everywhere = cases.target(count * devices)
shardings = jax.tree.map(lambda a: a.sharding, everywhere)


def state_at(step):
    return jax.jit(lambda: cases.init(step), out_shardings=shardings)()


def infinite():
    sharding = shardings.params["b"]
    return jax.jit(lambda: cases.init().params["b"] / 0, out_shardings=sharding)()


with Checkpointer(directory, every_steps=10) as checkpointer:
    if mode == "save":
        checkpointer.save(10, state_at(10))
        checkpointer.save(20, state_at(20))
        checkpointer.add_metrics(20, {"top1": 0.5})
        checkpointer.add_metrics(10, {"top1": 0.75})
        broken = state_at(30)._replace(params=state_at(30).params | {"b": infinite()})
        try:
            checkpointer.save(30, broken)
        except FloatingPointError as error:
            print("step 30 is not finite:", error, flush=True)
    elif mode == "fill":
        checkpointer.save(10, state_at(10))
        checkpointer.wait()
        told = pathlib.Path(directory, "told")
        if index == 1:  # the disk of this one is full
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
        checkpointer.save(20, state_at(20))
        if index == 1:
            try:
                checkpointer.wait()
            except CheckpointError as error:
                told.write_text(str(error))
        while not told.exists():
            time.sleep(0.05)
        os._exit(0)  # the other end of JAX would wait for the first save
    else:
        state = checkpointer.restore(everywhere)
        step = int(state.step)
        same = jax.tree.map(lambda a, b: (a == b).all(), state, state_at(step))
        if not all(map(bool, jax.tree.leaves(same))):
            raise ValueError(f"restored wrong arrays: {same}")
        print("restored", step, flush=True)
    if mode == "train":
        print("running", flush=True)
        while not checkpointer.stop_requested(step):
            step += 1
            time.sleep(0.05)
        checkpointer.save(step, state_at(step), force=True)
        print("stopped at", step, flush=True)
jax.distributed.shutdown()
