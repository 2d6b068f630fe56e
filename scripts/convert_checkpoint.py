"""Converts weights: the same as `python -m mlp_mixer.convert`, which has the help."""

import runpy

runpy.run_module("mlp_mixer.convert", run_name="__main__", alter_sys=True)
