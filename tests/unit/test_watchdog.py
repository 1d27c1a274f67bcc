"""The watchdog's conclusions, without a process: who failed first, who hangs, which node is gone, and when to wait."""

from dataclasses import replace

import pytest

from engine.errors import NODE_FAILED, PREEMPTED, USER_ERROR
from engine.stages.heartbeat import FIRST_STEP, Beat
from launch.watchdog import GRACE, LOST, MESSAGE_BYTES, SETTLE, NodeLife, RankLife, Verdict, judge, may_restart

LIMIT = 60.0


def rank(number, phase="update", step=412, age=1.0, warm=True, **more):
    return RankLife(number, Beat(number, 1000 + number, phase, step, age, warm), **more)


def node(number, *ranks, **more):
    return NodeLife(number, "abc"[number], ranks, **more)


def decide(*nodes, failing=0.0, limit=LIMIT):
    return judge("base", list(nodes), limit, failing)


def crashed(number, ended=1, message="Traceback\nValueError: bad", **more):
    return rank(number, status=1, ended=ended, message=message, **more)


def test_a_stage_that_goes_on_has_no_verdict():
    assert decide(node(0, rank(0)), node(1, rank(1))) is None


def test_a_rank_that_stands_still_is_named_with_node_phase_and_step():
    verdict = decide(node(0, rank(0)), node(1, rank(1, age=60.4)))
    assert verdict.message == (
        "stage 'base': rank 1 on node b: no progress for 60 s, last in update (backward, all-reduce, optimizer step) at step 412"
    )
    assert (verdict.status, verdict.restart, verdict.stuck) == (1, True, (1,))


def test_on_one_host_no_node_is_named():
    assert "rank 0: no progress for 61 s" in decide(node(0, rank(0, age=61))).message


def test_those_that_wait_for_the_rank_that_hangs_are_not_blamed():
    waiting = [rank(number, age=70) for number in (0, 1, 3)]
    verdict = decide(node(0, *waiting[:2]), node(1, rank(2, "forward", age=69), waiting[2]))
    assert verdict.stuck == (2,)
    behind = decide(node(0, *waiting[:2]), node(1, rank(2, step=411, age=75), waiting[2]))
    assert behind.stuck == (2,)


def test_the_rank_that_hangs_may_be_seen_a_moment_later_than_those_that_wait_for_it():
    waiting = node(0, rank(0, age=60.2))
    assert decide(waiting, node(1, rank(1, "forward", age=59.9))).stuck == (1,)
    assert decide(waiting, node(1, rank(1, age=59.9, stopped=True))).stuck == (1,)
    assert decide(waiting, node(1, rank(1, age=59.9))).stuck == (0,)


def test_a_stopped_process_is_the_one_that_hangs():
    verdict = decide(node(0, rank(0, age=61), rank(1, age=61, stopped=True)))
    assert verdict.stuck == (1,)
    assert verdict.message.endswith("at step 412 (the process is stopped)")


@pytest.mark.parametrize(("phase", "seconds"), [("data", 60), ("forward", 60), ("update", 60), ("evaluate", 60), ("save", 600)])
def test_a_phase_may_last_its_multiple_of_the_limit(phase, seconds):
    assert decide(node(0, rank(0, phase, age=seconds - 1))) is None
    assert decide(node(0, rank(0, phase, age=seconds + 1))).stuck == (0,)


def test_the_first_step_of_a_process_may_last_longer():
    assert decide(node(0, rank(0, "forward", 0, age=LIMIT * FIRST_STEP - 1, warm=False))) is None
    assert decide(node(0, rank(0, "forward", 0, age=LIMIT * FIRST_STEP + 1, warm=False)))


@pytest.mark.parametrize("phase", ["start", "prepare", "convert"])
def test_phases_without_a_limit_never_count_as_stuck(phase):
    assert decide(node(0, rank(0, phase, None, age=1e6))) is None


def test_a_silent_node_is_gone_after_the_limit_and_not_before():
    here = node(0, rank(0))
    assert decide(here, node(1, rank(1), silent=59)) is None
    verdict = decide(here, node(1, rank(1), silent=60.2))
    assert verdict.message == (
        "stage 'base': node b (rank 1): no heartbeat for 60 s, last in update (backward, all-reduce, optimizer step) "
        "at step 412: the node or its link is gone"
    )
    assert (verdict.status, verdict.restart) == (NODE_FAILED, True)


def test_broken_connections_and_a_short_silence_mean_that_the_node_is_gone():
    here = node(0, crashed(0, collective=True), exited=1)
    assert decide(here, node(1, rank(1), silent=LOST - 1), failing=3) is None
    verdict = decide(here, node(1, rank(1), silent=LOST + 1), failing=3)
    assert (verdict.status, "node b (rank 1): no heartbeat for 6 s" in verdict.message) == (NODE_FAILED, True)


def test_a_stall_beside_a_silent_node_is_the_node():
    verdict = decide(node(0, rank(0, age=61)), node(1, rank(1, age=20), silent=41))
    assert verdict.status == NODE_FAILED


def test_nodes_with_the_same_name_are_told_apart_by_their_numbers():
    one, two = (replace(node(number, rank(number), silent=number * 70.0), host="same") for number in (0, 1))
    assert "node 1 (same) (rank 1): no heartbeat" in decide(one, two).message


def test_a_node_that_was_launched_again_has_lost_its_ranks():
    verdict = decide(node(0, rank(0)), node(1, anew=True))
    assert verdict.message == "stage 'base': node b was launched again"
    assert (verdict.status, verdict.restart) == (NODE_FAILED, True)


def test_a_node_that_has_finished_may_be_silent():
    assert decide(node(0, rank(0)), node(1, rank(1, status=0), exited=0, silent=600)) is None


def test_the_first_cause_is_shown_and_not_what_it_took_along():
    nodes = (
        node(0, crashed(0, ended=5, message="Traceback\nRuntimeError: lost", collective=True), exited=1),
        node(1, crashed(1, ended=9), crashed(2, ended=7, message="Traceback\nKeyError: 'x'")),
    )
    verdict = decide(*nodes, failing=SETTLE)
    assert verdict.message == "stage 'base' crashed in process 2 on node b: KeyError: 'x'"
    assert verdict.details == "Traceback\nKeyError: 'x'"
    assert (verdict.status, verdict.restart) == (1, True)


def test_a_cause_is_known_at_once_when_all_is_over():
    nodes = (node(0, crashed(0, collective=True), exited=1), node(1, crashed(1, message="Traceback\nKeyError: 'x'"), exited=1))
    verdict = decide(*nodes, failing=0.1)
    assert (verdict.status, verdict.message) == (1, "stage 'base' crashed in process 1 on node b: KeyError: 'x'")


def test_on_several_nodes_the_cause_may_be_on_its_way():
    lost = node(0, crashed(0, collective=True), exited=1)
    assert decide(lost, node(1, rank(1)), failing=GRACE - 1) is None
    verdict = decide(lost, node(1, rank(1)), failing=GRACE + 1)
    assert (verdict.status, verdict.restart) == (NODE_FAILED, True)


def test_a_users_mistake_is_its_message_and_never_restarts():
    verdict = decide(node(0, rank(0, status=USER_ERROR, ended=1, message="recipe.yaml:3: no"), exited=1))
    assert (verdict.status, verdict.message) == (USER_ERROR, "recipe.yaml:3: no")
    assert not may_restart(verdict, 0, 5)


def test_a_rank_that_is_asked_to_stop_is_no_failure():
    done = rank(0, status=PREEMPTED, ended=1)
    verdict = decide(node(0, done, asked=15, exited=1))
    assert (verdict.status, may_restart(verdict, 0, 5)) == (PREEMPTED, False)
    assert decide(node(0, done, asked=2, exited=1)).status == 130
    # Without a launcher that asked: a batch system told the ranks themselves.
    assert decide(node(0, done, exited=1)).status == PREEMPTED


def test_a_checkpoint_on_the_way_out_may_take_longer_than_the_grace():
    writing, out = node(0, rank(0, "save"), asked=10), node(1, rank(1, status=PREEMPTED, ended=1), exited=1)
    assert decide(writing, out, failing=GRACE * 3) is None
    assert decide(writing, out, failing=LIMIT + 1).status == PREEMPTED


def test_a_killed_rank_is_not_blamed_on_the_one_that_lost_it():
    verdict = decide(node(0, crashed(0, collective=True), rank(1, killed=True), exited=1))
    assert verdict.message == "process 1 of stage 'base' was killed: out of memory, or killed by hand; run again to go on"


def test_memory_that_the_kernel_took_back_is_told_with_the_phase_and_what_to_change():
    verdict = decide(node(0, rank(0, "forward", killed=True), exited=1, short_of_memory=True))
    assert "was killed by the kernel: out of memory in forward at step 412: lower train.micro_batch_size" in verdict.message


def test_a_launcher_without_ranks_could_not_be_started():
    verdict = decide(node(0, exited=3))
    assert verdict.message == "stage 'base' could not be started (exit status 3)"


@pytest.mark.parametrize(("restarts", "most", "again"), [(0, 0, False), (0, 1, True), (1, 1, False), (2, 3, True)])
def test_restarts_are_bounded(restarts, most, again):
    assert may_restart(Verdict(1, "crash", restart=True), restarts, most) is again


@pytest.mark.parametrize("status", [USER_ERROR, PREEMPTED, 130])
def test_mistakes_and_requests_to_stop_never_restart(status):
    assert not may_restart(Verdict(status, "", restart=True), 0, 9)


def test_what_travels_between_nodes_keeps_the_cause_and_stays_small():
    ranks = [crashed(number, ended=number, message="x" * 50_000 + "the end") for number in range(1, 9)]
    before = node(1, replace(ranks[0], collective=True), *ranks[1:], asked=15, exited=1)
    after = NodeLife.of_json(before.to_json(), 2.5)
    assert after.silent == 2.5
    assert [len(found.message) for found in after.ranks] == [128, MESSAGE_BYTES, *[128] * 6]
    assert all(found.message.endswith("the end") for found in after.ranks)
    assert replace(after, silent=0.0, ranks=()) == replace(before, ranks=())
    assert [replace(found, message="") for found in after.ranks] == [replace(found, message="") for found in before.ranks]
