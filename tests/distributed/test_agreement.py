"""What processes tell each other, with threads for processes, see conftest.py."""

import time

import pytest

from imagen_jax.distributed import agreement


def test_all_hear_what_all_say(together):
    """Catches: an answer of an earlier round, one read before all have spoken, keys that are kept
    for ever.
    """

    def talk(index):
        heard = []
        for n in range(20):
            time.sleep(0.002 * ((index + n) % together.count))
            heard.append(agreement.gather(f"{index} in round {n}"))
        return heard

    for heard in together(talk):
        assert heard == [[f"{i} in round {n}" for i in range(together.count)] for n in range(20)]
    assert len(together.store) <= 2 * together.count


def test_unlike_processes_are_named_in_all(together):
    """Catches: an error in the odd process alone, after which the others wait for it, and one that
    does not say what differs.
    """

    def start(index):
        agreement.check({"config": "same", "data": "same"})
        with pytest.raises(
            ValueError,
            match=(
                r"^the processes were not started alike: process 2 \(c\) differs from process 0"
                r" \(a\) in: data; start the same command everywhere$"
            ),
        ):
            agreement.check({"config": "same", "data": "other" if index == 2 else "same"})

    together(start)


def test_facts_that_a_process_lacks_differ(together):
    """Catches: facts that are compared by their position, and a message with hundreds of them."""

    def start(index):
        facts = {f"base.{name}": name for name in "abcdefgh"}
        facts |= {"base.a": "other"} if index == 1 else {"x": ""}
        with pytest.raises(ValueError, match=r"process 1 .* in: base\.a, x; start") as error:
            agreement.check(facts)
        assert "process 2" not in str(error.value)

    def many(index):
        with pytest.raises(ValueError, match=r"process 2 \(c\) .* in: 0, 1, 2, 3, 4, \.\.\.;"):
            agreement.check({str(i): str(index // 2) for i in range(9)})

    together(start)
    together(many)


def test_alone():
    """Catches: a process that waits for others where there are none."""
    assert agreement.gather("x") == ["x"]
    agreement.check({"config": "any"})
