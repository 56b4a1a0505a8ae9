"""One run: config, optimizer, step, loop, metric writers.

`config.default_config` makes a config, `run.train` runs it. Nothing is imported here,
so that a recipe is read, and a wrong flag refused, without starting JAX.
"""
