"""What all tests of a session share, set before anything is compiled.

Here and not in conftest, of which `from conftest import …` makes a second copy.
"""

import atexit
import os
import shutil
import tempfile

import jax

from mlp_mixer import steps

# Most of a small test is compiling: less optimised, it is done in half the time.
FLAGS = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
# Initialisation too; test_steps compares what programs compile it with.
INIT_OPTIONS = dict(steps.INIT_OPTIONS)
steps.INIT_OPTIONS.clear()

# And the tests compile the same few programs: each once for the whole session, the
# programs in other processes included. Nothing is written to the user's own folder.
CACHE = {
    "jax_compilation_cache_dir": tempfile.mkdtemp(prefix="mlp_mixer_tests_"),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}
atexit.register(shutil.rmtree, CACHE["jax_compilation_cache_dir"], ignore_errors=True)
for name, value in CACHE.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
