"""Inputs nobody thought of, for everything that reads foreign bytes: 5,000 in all; ``scripts/fuzz`` has a million."""

import random

import fuzzing
import pytest
from fuzzing import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = -(-5000 // len(TARGETS))


@pytest.mark.fault(81)
@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_gives_a_value_or_the_declared_error_in_bounded_time_and_memory(name):
    seeds = st.sampled_from(TARGETS[name].seeds)
    near = st.builds(lambda seed, number: fuzzing.mutated(seed, random.Random(number)), seeds, st.integers(0, 2**32))
    fed = 0

    @given(near | st.binary(max_size=300) | seeds)
    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    def feed(data):
        nonlocal fed
        fed += 1
        fuzzing.check(name, data, measure_memory=fed % 100 == 0)

    feed()


@pytest.mark.parametrize("name", TARGETS)
def test_the_examples_that_inputs_are_made_from_are_of_use(name):
    assert any(fuzzing.check(name, seed) for seed in TARGETS[name].seeds)


BREACHES = {
    "ValueError": ValueError("x"),
    "no line": fuzzing.ProtocolError("\n"),
    "ConfigError": fuzzing.ConfigError("x"),
}


@pytest.mark.parametrize("why", BREACHES)
def test_a_reader_that_breaks_its_promise_is_found(monkeypatch, why):
    def read(_data):
        raise BREACHES[why]

    monkeypatch.setitem(TARGETS, "broken", fuzzing.Fuzzed(read, (b"",), fuzzing.ProtocolError))
    with pytest.raises(fuzzing.Broken, match=why):
        fuzzing.check("broken", b"input")


def test_a_reader_that_hoards_memory_is_found(monkeypatch):
    monkeypatch.setitem(TARGETS, "broken", fuzzing.Fuzzed(lambda _: bytearray(1 << 22), (b"",), fuzzing.ProtocolError))
    with pytest.raises(fuzzing.Broken, match="KiB"):
        fuzzing.check("broken", b"input", measure_memory=True)


def test_a_table_of_the_interpreters_own_that_doubles_once_is_not_the_readers(monkeypatch):
    once = [1 << 22]
    monkeypatch.setitem(
        TARGETS, "fair", fuzzing.Fuzzed(lambda _: bytearray(once.pop() if once else 1), (b"",), fuzzing.ProtocolError)
    )
    assert fuzzing.check("fair", b"input", measure_memory=True)
