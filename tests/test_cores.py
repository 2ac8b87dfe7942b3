"""Races run from the fastest cores of the moment, and leave the process where it was."""

from __future__ import annotations

import os
import threading

import pytest

from bench import cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs cores to be chosen")


@pytest.fixture
def host(monkeypatch):
    """Pretend that the host has four cores, of different pace."""
    kept = {"all": {0, 1, 2, 3}}
    paces = {0: 4.0, 1: 1.0, 2: 3.0, 3: 2.0}

    def keep(task, wanted):
        kept["me" if task == 0 else "others"] = set(wanted)

    monkeypatch.setattr(os, "sched_getaffinity", lambda task: kept["all"])
    monkeypatch.setattr(os, "sched_setaffinity", keep)
    monkeypatch.setattr(cores, "pace", lambda: paces[next(iter(kept["me"]))])
    return kept


def test_a_race_runs_from_the_fastest_cores(host):
    with cores.on_the_fastest() as found:
        assert found == {"cores": [1, 3], "pace": 1.0, "median pace": 2.5}
        assert host["others"] == {1, 3}
    assert host["others"] == {0, 1, 2, 3}


def test_a_process_is_left_where_it_was_whatever_is_raised():
    before, seen = os.sched_getaffinity(0), []
    go = threading.Event()
    other = threading.Thread(target=lambda: go.wait() and seen.append(os.sched_getaffinity(0)))
    other.start()

    def race():
        with cores.on_the_fastest() as found:
            seen.append(set(found["cores"]))
            go.set()
            other.join()
            raise KeyError

    with pytest.raises(KeyError):
        race()
    assert seen[0] == seen[1], "all threads of the process are kept there"
    assert os.sched_getaffinity(0) == before


def test_cores_are_named_for_taskset(host, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cores", "--keep", "3"])
    cores.main()
    assert capsys.readouterr().out == "1,3,2\n"


def test_where_no_core_can_be_chosen_nothing_is_said(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    with cores.on_the_fastest() as found:
        assert found == {}
