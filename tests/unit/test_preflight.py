"""Which nodes the preflight calls bad, and that every node meets its neighbours; a run over the loopback."""

import json
import socket
import subprocess
import sys

import pytest

from launch.nodes.place import Place
from launch.nodes.preflight import NodeReport, Report, conclude
from launch.nodes.preflight_rank import pairs
from tests.distributed.conftest import ROOT


def report(*speeds, **problems):
    nodes = [NodeReport(number, f"h{number}", 0, speed, problems.get(f"h{number}")) for number, speed in enumerate(speeds)]
    return conclude(Report(nodes))


@pytest.mark.parametrize("nodes", range(2, 10))
def test_every_node_meets_both_neighbours_and_one_at_a_time(nodes):
    rounds = pairs(nodes)
    met = sorted(tuple(sorted(pair)) for turn in rounds for pair in turn)
    assert met == sorted({tuple(sorted((node, (node + 1) % nodes))) for node in range(nodes)})
    for turn in rounds:
        members = [node for pair in turn for node in pair]
        assert len(members) == len(set(members))


def test_one_node_has_nobody_to_meet():
    assert pairs(1) == []


def test_a_node_far_slower_than_the_others_is_bad():
    found = report(10.0, 4.7, 9.0, 11.0)
    assert found.bad_nodes == ["h1"]
    assert found.nodes[1].problem == "4.70 GB/s to its neighbours, where the median is 9.50"


def test_nodes_that_differ_a_little_are_fit():
    assert report(10.0, 6.0, 9.0).bad_nodes == []


def test_of_two_nodes_none_is_called_the_slow_one():
    assert report(1.0, 10.0).bad_nodes == []


def test_a_rank_that_lost_its_peer_is_not_the_bad_one():
    found = report(None, None, None, h0="rank 0: Connection closed by peer", h2="rank 2: CUDA error: unspecified launch failure")
    assert found.bad_nodes == ["h2"]


def test_ranks_that_lost_each_other_are_both_named():
    assert report(None, None, h0="rank 0: timed out", h1="rank 1: timed out").bad_nodes == ["h0", "h1"]


def test_a_node_that_has_not_come_is_named_by_its_number_when_its_name_is_not_known():
    nodes = [NodeReport(0, "h0"), NodeReport(1, None, problem="has not come within 60 s")]
    assert conclude(Report(nodes)).bad_nodes == ["1"]


@pytest.fixture
def run(tmp_path):
    """Starts the preflight of one node; returns its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(rank, nodes, limit, *extra):
        place = Place(nodes, rank, "127.0.0.1", port)
        code = (
            "import sys; from pathlib import Path; from launch import cli; cli.main(['launch', 'recipes/demo.yaml', "
            f"'--preflight', '--json', '--nodes', '{place.nodes}', '--node-rank', '{place.rank}', '--main-address', '127.0.0.1', "
            f"'--main-port', '{port}', '--heartbeat-limit', '{limit}', '--records', {str(tmp_path)!r}, *sys.argv[1:]])"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, *extra], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )

    return run


def test_two_nodes_that_are_fit_are_measured(run, tmp_path):
    processes = [run(rank, 2, 60) for rank in range(2)]
    (out, err), _ = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], err
    found = json.loads(out)
    assert found["bad_nodes"] == []
    assert found["all_reduce_gigabytes_per_second"] > 0
    assert all(node["gigabytes_per_second"] > 0 for node in found["nodes"])
    assert json.loads((tmp_path / "preflight.json").read_text()) == found


def test_a_node_that_does_not_come_is_named_and_the_status_says_that_another_try_may_help(run, tmp_path):
    out, err = (process := run(0, 2, 2)).communicate(timeout=120)
    assert (process.returncode, err.splitlines()[-1]) == (76, "error: bad nodes: 1")
    assert json.loads(out)["nodes"][1]["problem"] == "has not come within 2 s"
    assert (tmp_path / "bad-nodes").read_text() == "1\n"
