"""Runs the trainer with a device that fails during a step, for tests.

FAILING_DEVICE=STEP:ERROR; the step, from 1, raises JAX's runtime error of that text.
"""

import os
import runpy

import jax

from imagen_jax.training.run import Run


def main():
    step, _, text = os.environ["FAILING_DEVICE"].partition(":")
    compile_steps, calls = Run.compile_steps, []

    def failing(run):
        def failing_step(compiled):
            def step_once(*args):
                calls.append(compiled)
                if len(calls) == int(step):
                    raise jax.errors.JaxRuntimeError(text)
                return compiled(*args)

            return step_once

        return {bucket: failing_step(compiled) for bucket, compiled in compile_steps(run).items()}

    Run.compile_steps = failing
    runpy.run_module("imagen_jax.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
