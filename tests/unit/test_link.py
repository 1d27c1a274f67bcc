"""The line between launchers, over the loopback: who is heard, who is not, and how nodes come together."""

import json
import socket
import time

import pytest

from engine.errors import NODE_FAILED, PREEMPTED, UserError
from launch.nodes import link as module
from launch.nodes.link import Link, Order, Report, gather, leading, lives
from launch.nodes.place import Place
from launch.ranks import Requests
from launch.watchdog import NodeLife, RankLife, StageError, Verdict

SOON = 10.0


@pytest.fixture
def place():
    """Returns the place of a node; all of them agree on a free port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return lambda rank, nodes=2: Place(nodes, rank, "127.0.0.1", port)


def line(place, directory, setup="same", **more):
    return Link(place, directory, Report(NodeLife(place.rank, f"host{place.rank}"), setup, sender=f"{place.rank}", **more))


def when(happened):
    give_up = time.monotonic() + SOON
    while not happened():
        assert time.monotonic() < give_up, "never happened"
        time.sleep(0.01)


def test_reports_reach_node_0_and_orders_the_others(place, tmp_path):
    with line(place(0), tmp_path) as first, line(place(1), tmp_path) as second:
        second.say(stage="base", attempt=3, life=NodeLife(1, "host1", (RankLife(1, status=1, message="bad"),)))
        when(lambda: 1 in first.others() and first.others()[1].stage == "base")
        (seen,) = lives(first, "base", 3)
        assert seen.ranks[0].message == "bad"
        assert 0 <= seen.silent < SOON
        (other_attempt,) = lives(first, "base", 4)
        assert other_attempt.ranks == ()
        verdict = Verdict(1, "why", restart=True, stuck=(1,))
        first.command(stage="base", attempt=3, verdict=verdict)
        when(lambda: second.order.verdict is not None)
        assert (second.order.verdict.message, second.order.attempt, second.node0().host) == ("why", 3, "host0")


def test_silence_grows_when_a_node_has_gone(place, tmp_path):
    with line(place(0), tmp_path) as first:
        with line(place(1), tmp_path):
            when(lambda: 1 in first.others())
        when(lambda: first.others()[1].life.silent > 2 * module.BEAT)


def test_the_last_thing_that_a_node_says_is_heard(place, tmp_path):
    with line(place(0), tmp_path) as first:
        with line(place(1), tmp_path) as second:
            when(lambda: 1 in first.others())
            second.say(error="boom")
        when(lambda: first.others()[1].error == "boom")


def test_what_comes_without_the_token_is_not_listened_to(place, tmp_path):
    with line(place(0), tmp_path) as first, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/.launch-token").write_text("another")
        content = {"token": first.token, "number": 1, "node": 1, "order": {}, "report": {}}
        for data in (
            b"",
            b"\xff\xfe",
            b"[]",
            b"{}",
            json.dumps({**content, "token": "x"}).encode(),
            json.dumps(content).encode(),
        ):
            stranger.sendto(data, ("127.0.0.1", place(0).port))
        with line(place(1), tmp_path / "elsewhere"):
            time.sleep(3 * module.BEAT)
        assert first.others() == {}
        with line(place(1), tmp_path):
            when(lambda: 1 in first.others())


def test_the_token_is_for_this_user_alone_and_is_removed(place, tmp_path):
    with line(place(0), tmp_path):
        assert (tmp_path / ".launch-token").stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == []


def test_other_options_on_another_node_are_a_mistake(place, tmp_path):
    with line(place(0), tmp_path) as first, line(place(1), tmp_path, setup="other"):
        when(lambda: first.others())
        with pytest.raises(UserError, match=r"^node 1 \(host1\) was started with another recipe or other options than node 0"):
            first.check()


def test_one_number_on_two_hosts_is_a_mistake(place, tmp_path):
    with line(place(0), tmp_path) as first, line(place(1), tmp_path):
        when(lambda: first.others())
        twin = line(place(1), tmp_path)
        twin.say(sender="twin")
        with twin:
            when(lambda: first.others()[1].sender == "twin")
            when(lambda: first.others()[1].sender == "1")
        with pytest.raises(UserError, match=r"^--node-rank 1 was given to two launchers"):
            first.check()


def test_a_node_may_be_launched_again_and_its_ranks_of_the_attempt_are_gone(place, tmp_path):
    with line(place(0), tmp_path) as first:
        with line(place(1), tmp_path, stage="base", attempt=0):
            when(lambda: first.others())
            assert [life.anew for life in lives(first, "base", 0)] == [False]
        again = line(place(1), tmp_path)
        again.say(sender="again")
        with again:
            when(lambda: first.others()[1].sender == "again")
            time.sleep(2 * module.BEAT)
        first.check()
        assert [life.anew for life in lives(first, "base", 0)] == [True]


def test_a_port_in_use_is_named(place, tmp_path):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", place(0).port))
        with pytest.raises(UserError, match=r"^--main-port \d+: in use on this host"):
            line(place(0), tmp_path).__enter__()


def test_an_attempt_begins_when_all_nodes_are_ready_for_it(place, tmp_path):
    with line(place(0), tmp_path) as first, line(place(1), tmp_path, stage="base", attempt=2, ready=True) as second:
        gather(first, "base", 2, Requests(), print)
        when(lambda: second.order == Order("base", 2, go=True))


def test_a_node_that_does_not_come_is_named_with_what_it_needs(place, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "JOIN_SECONDS", 1.5)
    message = r"^node 2 has not come within 2 s: .* TCP and UDP port \d+ of 127.0.0.1"
    with (
        line(place(0, 3), tmp_path) as first,
        line(place(1, 3), tmp_path, stage="base", attempt=0, ready=True),
        pytest.raises(StageError, match=message) as error,
    ):
        gather(first, "base", 0, Requests(), print)
    assert error.value.status == NODE_FAILED


def test_a_node_that_was_asked_to_stop_stops_all_while_they_gather(place, tmp_path):
    with line(place(0, 3), tmp_path) as first, line(place(1, 3), tmp_path) as second:
        second.say(life=NodeLife(1, "host1", asked=15))
        with pytest.raises(StageError, match="asked to stop") as error:
            gather(first, "base", 0, Requests(), print)
    assert error.value.status == PREEMPTED


def test_a_mistake_on_another_node_ends_all(place, tmp_path):
    with (
        line(place(0), tmp_path) as first,
        line(place(1), tmp_path, error="no such file"),
        pytest.raises(UserError, match=r"^node 1 \(host1\): no such file$"),
    ):
        gather(first, "base", 0, Requests(), print)


@pytest.mark.parametrize(("error", "status"), [(UserError("bad"), 2), (StageError(76, "bad"), 76), (None, None)])
def test_the_others_learn_how_everything_ended(place, tmp_path, monkeypatch, error, status):
    monkeypatch.setattr(module, "LINGER", 1.0)
    with line(place(0), tmp_path) as first, line(place(1), tmp_path) as second:
        when(lambda: first.others())
        try:
            with leading(first):
                if error:
                    raise error
        except (UserError, StageError) as raised:
            assert raised is error
        assert second.order.over
        assert (second.order.verdict and (second.order.verdict.status, second.order.verdict.message)) == (
            error and (status, "bad")
        )
