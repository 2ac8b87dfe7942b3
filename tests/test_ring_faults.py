"""Every fault of a ring ends in an error that names the culprit, on every survivor, in time; never in garbage."""

from __future__ import annotations

import json
import time

import pytest

from attnplan.runtime.ring.faults import Board, Report, culprit, error_of
from attnplan.runtime.ring.handshake import Cards, digest
from tests.ring_group import Ended, run_group
from tests.ring_workers import (
    CULPRIT,
    RANKS,
    TIMEOUT,
    again,
    die,
    fail,
    hang,
    misbehave,
    mismatch,
    nothing,
    off_by,
    wrong_tensors,
)

SLACK = 5.0


def survivors(found: list[Ended]) -> list[Ended]:
    return [one for one in found if one.rank != CULPRIT]


def check(found: list[Ended], within: float = TIMEOUT + SLACK) -> None:
    for one in survivors(found):
        assert one.error.startswith("RingError"), f"rank {one.rank}: {one.error or one}"
        assert one.exit_code == 1
        assert one.seconds <= within, f"rank {one.rank} took {one.seconds:.1f} s"
        assert one.facts[:2] == (one.rank, CULPRIT), one.error
        assert one.facts[3] == 2, one.error
        assert f"rank {CULPRIT}" in one.error


FAULTS = {"death": die, "hang": hang, "exception": fail}
FORWARD, BACKWARD = "keys and values", "gradients of keys and values"


def ring_with(fault: str, phase: str, collective: str) -> list[Ended]:
    args = (FAULTS[fault], phase, collective, "first")
    hangs = CULPRIT if fault == "hang" else -1
    return run_group(RANKS, misbehave, *args, deadline=TIMEOUT + SLACK + 3, hangs=hangs)


QUICK = [(fault, FORWARD, "p2p") for fault in FAULTS]
REST = [(f, p, c) for f in FAULTS for p, c in ((BACKWARD, "p2p"), (FORWARD, "all-to-all"), (BACKWARD, "all-to-all"))]


@pytest.mark.parametrize(
    ("fault", "phase", "collective"), [*QUICK, *(pytest.param(*x, marks=pytest.mark.slow) for x in REST)], ids=str
)
def test_survivors_name_the_rank(fault: str, phase: str, collective: str) -> None:
    check(found := ring_with(fault, phase, collective))
    if fault == "exception":
        assert found[CULPRIT].error == "ValueError: the user's own"
        assert all("ValueError: the user's own" in one.error for one in survivors(found))
    else:
        assert all(one.cause for one in survivors(found)), "the original exception is gone"


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("collective", ["p2p", "all-to-all"])
@pytest.mark.parametrize("time_and_again", range(20))
def test_twenty_times_out_of_twenty(fault: str, collective: str, time_and_again: int) -> None:
    check(ring_with(fault, FORWARD, collective))


WORDS = {
    "plan": "differs in the plan",
    "call": "differs in the number of calls",
    "longer": "differs in the batch size from rank 0 (1): ",
    "shorter": "differs in the batch size from rank 0 (5): ",
    "dtype": "torch.bfloat16",
    "gradients": "differs in whether gradients are asked for",
}


@pytest.mark.parametrize(
    "how", [how if how in ("longer", "plan", "dtype") else pytest.param(how, marks=pytest.mark.slow) for how in WORDS]
)
def test_mismatch_is_found_before_the_first_byte(how: str) -> None:
    found = run_group(RANKS, mismatch, how, "always")
    for one in found:  # the culprit learns it, too
        assert one.error.startswith("RingError"), one
        assert WORDS[how] in one.error
        assert "nothing was sent" in one.error
        assert one.facts[1] == CULPRIT
        assert one.seconds < TIMEOUT


ALONE = {  # what the survivors say, and the rank itself
    "plan": ("rank 2 differs in the plan", "RingError: rank 2 of 4, step 2, handshake: "),
    "batch": ("rank 2 differs in the batch size from rank 0 (1): ", "RingError: rank 2, step 2, handshake: "),
    "gradients": ("rank 2 differs in whether gradients are asked for", "RingError: rank 2, step 2, handshake: rank 2 "),
    "shorter": ("rank 2 raised SpecError: q has shape [1, 4, 11, 8]", "SpecError: q has shape [1, 4, 11, 8]"),
    "longer": ("rank 2 raised SpecError: q has shape [1, 4, 13, 8]", "SpecError: q has shape [1, 4, 13, 8]"),
    "dtype": ("rank 2 raised SpecError: q has dtype torch.bfloat16", "SpecError: q has dtype torch.bfloat16"),
}


@pytest.mark.parametrize(
    ("strategy", "how"),
    [
        (strategy, how)
        if (strategy, how) in (("zigzag > ring", "batch"), ("contiguous > all-gather", "longer"))
        else pytest.param(strategy, how, marks=pytest.mark.slow)
        for strategy in ("zigzag > ring", "contiguous > all-gather", "contiguous > ulysses", "contiguous > rows")
        for how in ALONE
    ],
)
def test_a_rank_that_alone_sees_a_change_is_named_by_all(strategy: str, how: str) -> None:
    """With ``first`` only the rank whose call is new compares: the others wait for its keys, and learn why in vain."""
    check(found := run_group(RANKS, off_by, strategy, how, "first", deadline=2 * TIMEOUT + SLACK + 30))
    words, own = ALONE[how]
    assert all(words in one.error for one in survivors(found)), found
    assert found[CULPRIT].error.startswith(own)


@pytest.mark.slow
def test_a_rank_that_alone_sees_no_change_is_named_by_all() -> None:
    found = run_group(RANKS, mismatch, "unchanged", "first", deadline=2 * TIMEOUT + SLACK)
    check(found)
    assert all("rank 2 did not come to compare within 2 s" in one.error for one in survivors(found))
    assert "rank 2 differs in the batch size from rank 0 (5): rank 2: 1" in found[CULPRIT].error


def test_a_rank_whose_own_call_is_wrong_tells_the_others() -> None:
    found = run_group(RANKS, wrong_tensors)
    assert not found[CULPRIT].error  # it raises its own error, in detail
    for one in survivors(found):
        assert "rank 2 was called with tensors that do not fit the plan" in one.error


def test_a_broken_ring_stays_broken() -> None:
    found = run_group(RANKS, again)
    for one in survivors(found):
        assert "broke at an earlier call: " in one.error
        assert "start the process group anew" in one.error
        assert one.facts[:2] == (one.rank, CULPRIT)
    assert found[CULPRIT].exit_code == 9


@pytest.mark.parametrize(
    ("validate", "times"), [pytest.param("always", 4, marks=pytest.mark.slow), ("first", 2), ("off", 0)]
)
def test_when_ranks_shake_hands(validate: str, times: int) -> None:
    assert [one.value for one in run_group(2 * 2, nothing, validate)] == [times] * 4


class Remembering(dict[str, bytes]):
    """A store in one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def add(self, key: str, more: int) -> int:
        self[key] = str(int(super().get(key, b"0")) + more).encode()
        return int(self[key])

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def delete_key(self, key: str) -> None:
        del self[key]


def test_cards_are_found_by_those_who_do_not_meet_and_forgotten_by_those_who_do() -> None:
    store = Remembering()
    first, second, third = (Cards(store, rank, 3, "x") for rank in range(3))
    first.leave([0, 7, 4, 1])
    assert second.at(4) == {0: [0, 7, 4, 1]}
    assert second.at(3) == {}
    start = time.monotonic()
    assert third.meet([0, 7, 4, 1], timeout=0.01) == {0: [0, 7, 4, 1], 2: [0, 7, 4, 1]}  # the second did not come
    assert time.monotonic() - start < 5
    second.leave([0, 7, 5, 1])
    third.leave([0, 7, 5, 2])
    assert first.meet([0, 7, 5, 1], timeout=1.0) == {0: [0, 7, 5, 1], 1: [0, 7, 5, 1], 2: [0, 7, 5, 2]}
    sizes = []
    for step in range(6, 12):
        for one in (first, second):
            one.leave([0, 7, step, 1])
        assert set(third.meet([0, 7, step, 1], timeout=1.0)) == {0, 1, 2}
        for one in (first, second):
            one._forget(step, one._key(step, f"{digest(json.dumps([0, 7, step, 1])):016x}"))
        sizes.append(len(store))
    assert sizes[-1] == sizes[-2] == sizes[-3], "the store grows"


def test_the_first_to_fail_is_found_through_others() -> None:
    lost = {r: Report(r, 1, 1, "lost", r + 1, "reset") for r in range(3)}
    assert culprit(lost[0], lost, 4) == 3
    assert "rank 3 did not answer other ranks, on which this one depends: reset" in str(
        error_of(lost[0], lost, 4, "forward")
    )
    assert culprit(lost[0], {**lost, 3: Report(3, 1, 0, "raised", -1, "KeyError: 1")}, 4) == 3
    each = {r: Report(r, 1, 1, "lost", peer, "reset") for r, peer in ((0, 2), (1, 3), (2, 4))}  # 3 and 4 are gone
    assert (culprit(each[0], each, 5), culprit(each[1], each, 5)) == (4, 3)
    unknown = {r: Report(r, 1, 1, "lost", -1, "timed out") for r in (0, 1, 3)}
    assert culprit(unknown[0], unknown, 4) == 2
    assert culprit(unknown[0], {0: unknown[0]}, 4) == -1


def test_a_store_that_is_gone_holds_nobody_up() -> None:
    class Gone:
        def set(self, *args: object) -> None:
            time.sleep(60)

        def check(self, *args: object) -> bool:
            raise RuntimeError("connection refused")

    board, own = Board(Gone(), 0, 4, "x"), Report(0, 1, 1, "lost", 2, "reset")
    start = time.monotonic()
    board.post(own)
    assert board.collect(own, grace=0.2) == {0: own}
    assert time.monotonic() - start < 2.5
