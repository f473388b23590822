"""When a run gets a new attempt: what is seen goes in, what is done comes out, and no clock is waited for."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fedllm.federation.server import attempts
from fedllm.federation.server.attempts import Attempt, Seen, decide

SEEN = Seen(
    now=1000.0,
    wanted="run",
    asked=1,
    patience=60.0,
    wanted_sites=["a", "b"],
    missing=[],
    left_out=[],
    refused=[],
    working=False,
    pending=False,
    status="",
    round=0,
    end={},
)
WAITING = Attempt(asked=1)
RUNNING = Attempt(state="running", asked=1, number=1, job="j", since=900.0)


def test_it_begins_when_all_sites_are_there_and_waits_so_long_for_those_that_are_not():
    begun, do = decide(WAITING, SEEN)
    assert (begun.state, begun.number, do) == ("starting", 1, "submit")
    waits, do = decide(WAITING, SEEN._replace(missing=["b"]))
    assert (waits.state, do, waits.reason) == ("waiting", "", "waiting for b")
    assert decide(waits, SEEN._replace(missing=["b"], now=1059.0))[1] == ""
    assert decide(waits, SEEN._replace(missing=["b"], now=1061.0))[1] == "submit"
    assert decide(waits, SEEN._replace(missing=["a", "b"], now=9999.0))[1] == ""


def test_what_a_loop_says_at_its_end_is_what_becomes_of_the_run():
    for said, state in {"done": "done", "failed": "failed", "aborted": "waiting", "crashed": "waiting"}.items():
        assert decide(RUNNING, SEEN._replace(working=True, end={"state": said, "reason": "r"}))[0].state == state
    assert decide(RUNNING, SEEN._replace(wanted="stop", end={"state": "stopped"}))[0].state == "stopped"
    assert decide(RUNNING, SEEN._replace(end={"state": "stopped"}))[0].state == "waiting"


def test_a_dead_process_is_a_new_attempt():
    over, do = decide(RUNNING, SEEN)
    assert (over.state, over.job, do) == ("waiting", "", "")
    again, do = decide(over, SEEN._replace(now=1001.0))
    assert (again.number, do) == (2, "submit")


def test_attempts_that_come_to_nothing_at_once_wait_longer_and_then_end_the_run():
    attempt, now, begun = WAITING, 0.0, []
    while attempt.state != "failed":
        now += 1
        attempt, do = decide(attempt, SEEN._replace(now=now, working=False, pending=False, status="FINISHED"))
        if do == "submit":
            begun.append(now)
            attempt = attempt._replace(job="j")
    assert len(begun) == attempts.TRIES and "came to nothing" in attempt.reason
    waits = [later - sooner for sooner, later in pairwise(begun)]
    assert waits == sorted(waits) and waits[-1] > waits[0] >= 2


def test_an_attempt_that_finished_a_round_or_lived_long_is_no_failure():
    quick = RUNNING._replace(since=995.0)
    assert decide(quick, SEEN)[0].failures == 1
    assert decide(quick, SEEN._replace(round=1))[0].failures == 0
    assert decide(RUNNING, SEEN)[0].failures == 0


def test_an_attempt_ends_for_a_site_that_is_back_but_not_at_once_and_never_for_itself():
    back = SEEN._replace(working=True, left_out=["b"])
    assert decide(RUNNING._replace(since=999.0), back)[1] == ""
    ending, do = decide(RUNNING, back)
    assert (do, ending.state, ending.reason) == ("abort", "ending", "b came back")
    assert decide(ending, back)[1] == ""
    assert decide(ending, back._replace(now=1000 + attempts.STOPPING + 1))[1] == "abort"
    assert decide(ending, SEEN)[0].failures == 0


def test_a_revoked_site_ends_an_attempt_at_once():
    assert decide(RUNNING._replace(since=1000.0), SEEN._replace(working=True, refused=["b"]))[1] == "abort"


def test_a_run_that_is_stopped_has_time_to_stop_by_itself():
    stop = SEEN._replace(wanted="stop", working=True)
    stopping, do = decide(RUNNING, stop)
    assert (stopping.state, do) == ("stopping", "")
    assert decide(stopping, stop._replace(now=1000 + attempts.STOPPING + 1))[1] == "abort"
    assert decide(stopping, stop._replace(working=False))[0].state == "stopped"
    assert decide(WAITING, SEEN._replace(wanted="stop"))[0].state == "stopped"


def test_what_is_settled_stays_until_somebody_asks_again():
    for state in ("done", "failed", "stopped"):
        settled = Attempt(state=state, asked=1, number=3)
        assert decide(settled, SEEN) == (settled, "")
        assert decide(settled, SEEN._replace(asked=2))[1] == "submit"
        assert decide(settled, SEEN._replace(asked=2, wanted="stop"))[0].state == state


def test_an_attempt_that_the_engine_never_starts_ends():
    late = SEEN._replace(pending=True, now=900 + attempts.STUCK + 1)
    assert decide(RUNNING._replace(state="starting"), late)[1] == "abort"
    assert decide(RUNNING._replace(state="starting"), late._replace(now=950.0))[1] == ""


@given(
    st.lists(
        st.builds(
            SEEN._replace,
            wanted=st.sampled_from(["run", "stop"]),
            asked=st.integers(1, 3),
            missing=st.sampled_from([[], ["a"], ["a", "b"]]),
            left_out=st.sampled_from([[], ["a"]]),
            working=st.booleans(),
            pending=st.booleans(),
            round=st.integers(0, 3),
            end=st.sampled_from([{}, {"state": "aborted"}, {"state": "done"}, {"state": "crashed"}]),
        ),
        max_size=60,
    )
)
def test_whatever_is_seen_there_is_never_a_second_job_beside_the_first(seen):
    attempt = WAITING
    for place, each in enumerate(seen):
        before = attempt
        attempt, do = decide(attempt, each._replace(now=1000.0 + 20 * place))
        if do == "submit":
            assert not before.job and attempt.number == before.number + 1
            attempt = attempt._replace(job=f"j{attempt.number}")
        if do == "abort":
            assert attempt.job
