"""Whether others used the machine while something was measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tasks import quiet


@pytest.fixture
def machine(monkeypatch):
    """A machine of 4 cores on which each block takes a second; the returned list holds, for each block to come, the
    cores that were busy and those of them that this process used."""
    blocks: list[tuple[float, float]] = []
    now = [0.0, 0.0, 0.0]
    begun = []

    def clocks():
        if begun:
            busy, own = blocks.pop(0)
            now[:] = now[0] + 1, now[1] + busy, now[2] + own
            begun.clear()
        else:
            begun.append(True)
        return tuple(now)

    monkeypatch.setattr(quiet, "_clocks", clocks)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return blocks


@pytest.mark.parametrize(("busy", "own", "share"), [(3, 1, 0.5), (4, 4, 0), (1.9, 2, 0), (0.4, 0, 0.1)])
def test_the_share_of_others_is_what_this_process_did_not_use(machine, busy, own, share):
    machine.append((busy, own))
    with quiet.busy_share() as others:
        assert others.share is None
    assert others.share == pytest.approx(share)


def test_a_measurement_that_was_disturbed_is_taken_once_more(machine):
    machine += [(4, 2), (2.2, 2)]
    found = iter(["first", "second", "third"])
    assert quiet.undisturbed(lambda: next(found), "the latency") == ("second", None)
    machine += [(2, 2)]
    assert quiet.undisturbed(lambda: next(found), "the latency") == ("third", None)


@pytest.mark.parametrize(("busy", "taken"), [([3.2, 4], "first"), ([4, 3.2], "second")])
def test_the_calmer_of_two_disturbed_tries_counts_and_says_so(machine, busy, taken):
    machine += [(cores, 2) for cores in busy]
    found = iter(["first", "second"])
    value, note = quiet.undisturbed(lambda: next(found), "the latency")
    assert value == taken
    assert note is not None
    assert note.startswith("other processes used 30% of the machine's 4 cores while the latency was taken")


def test_another_process_that_computes_is_seen():
    spin = "import time\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with quiet.busy_share() as others:
            time.sleep(0.5)
        child.kill()
    assert others.share is not None
    assert others.share > 0.5 / (os.cpu_count() or 1)


def test_nobody_can_tell_of_a_short_block():
    with quiet.busy_share() as others:
        pass
    assert others.share is None
