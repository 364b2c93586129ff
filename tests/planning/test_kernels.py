"""Pallas kernels in a traced program."""

import jax
import jax.numpy as jnp
import pytest

from imagen_jax.hardware import chips
from imagen_jax.models.attention_kernel import flash_attend
from imagen_jax.planning import kernels


def calls(b, c, times=1):
    q = jnp.zeros((b, 64, c), jnp.bfloat16)
    attend = lambda q: flash_attend(q, ((q, q, None),), c // 64)
    several = lambda q: jax.lax.scan(lambda q, _: (attend(q), None), q, None, times)[0]
    return list(kernels.calls(jax.make_jaxpr(several)(q).jaxpr))


def test_calls_in_loops_count():
    """Catches a kernel in a loop counted once, and kernels inside transformations not found."""
    assert [times for _, times in calls(2, 128, times=3)] == [3]


@pytest.mark.parametrize("branch, rows", [(-1, 4), (0, 2)])
def test_one_branch_of_a_conditional_counts(branch, rows):
    """Catches the kernels of guided and unguided evaluations counted together."""
    q = jnp.zeros((2, 64, 128), jnp.bfloat16)
    attend = lambda q: flash_attend(q, ((q, q, None),), 2)
    both = lambda q: attend(jnp.concatenate([q, q]))[:2]
    program = lambda guided, q: jax.lax.cond(guided, both, attend, q)
    jaxpr = jax.make_jaxpr(program)(True, q).jaxpr
    ((call, _),) = kernels.calls(jaxpr, branch=branch)
    assert call.outvars[0].aval.shape[0] == rows


@pytest.mark.parametrize(
    "b, c, name, cores",
    [(2, 128, "v4", 2), (1, 256, "v5p", 2), (1, 128, "v4", 1), (2, 128, "v5e", 1)],
)
def test_cores_share_a_grid(b, c, name, cores):
    """Catches both cores of a v4 or v5p used for a grid that does not divide, and one where it
    does.
    """
    ((call, _),) = calls(b, c)
    assert kernels.cores_at_work(call, chips.by_name(name)) == cores
