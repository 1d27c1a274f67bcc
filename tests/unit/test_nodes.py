"""The place of a host among the nodes: command lines, ports, interfaces, and every wrong number as one line."""

import socket

import pytest

from engine.config import load_recipe
from engine.errors import UserError
from launch import local
from launch.local import command, process_count
from launch.nodes import place as nodes
from launch.nodes.place import PORT, Place, Supervision, interface_to, network, node_command, place_of
from launch.recipe import load_stages
from tests.recipes import write_recipe


@pytest.fixture
def stage(tmp_path):
    def stage(*overrides):
        return load_stages(load_recipe(write_recipe(tmp_path), list(overrides), tmp_path / "runs"))[0]

    return stage


def value(words, flag):
    return words[words.index(flag) + 1]


def test_the_command_of_a_node_says_where_it_stands_and_starts_its_own_ranks(stage):
    words = command(stage(), [], Place(4, 2, "host0", 29600, 8), attempt=0)
    assert words[1:4] == ["-m", "launch.accelerated", "--use_deepspeed"]
    assert [value(words, f"--{name}") for name in ("num_processes", "num_machines", "machine_rank")] == ["32", "4", "2"]
    assert [value(words, f"--{name}") for name in ("main_process_ip", "main_process_port")] == ["host0", "29600"]
    assert value(words, "--deepspeed_multinode_launcher") == "standard"


def test_each_attempt_meets_on_its_own_port(stage):
    ports = [value(command(stage(), [], Place(2, 0, "a"), attempt), "--main_process_port") for attempt in range(3)]
    assert ports == [str(PORT), str(PORT + 1), str(PORT + 2)]


def test_a_restart_goes_on_from_the_checkpoints_even_when_the_first_attempt_threw_them_away(stage):
    anew = stage()
    anew.restart = True
    assert "--restart" in command(anew, [], Place(2, 0, "a"), 0)
    assert "--restart" not in command(anew, [], Place(2, 0, "a"), 1)


def test_the_nodes_decide_how_many_ranks_auto_means(stage):
    assert process_count(stage(), Place(2, 1, "a", per_node=3)) == 6
    assert process_count(stage("teacher.processes=6"), Place(2, 1, "a", per_node=3)) == 6
    assert process_count(stage(), Place(per_node=2)) == 2
    with pytest.raises(UserError, match=r"^processes=4 in the recipe, but --nodes 2 × 3 a node = 6: say processes: auto"):
        process_count(stage("teacher.processes=4"), Place(2, 1, "a", per_node=3))


BAD = {
    "rank too high": ((2, 2, "a", PORT, None, None), "--node-rank 2: with --nodes 2 it is a number from 0 to 1"),
    "no rank": ((2, None, "a", PORT, None, None), "--node-rank is missing: run this on each of the 2 hosts"),
    "no address": ((2, 0, None, PORT, None, None), "--main-address is missing"),
    "both numbers": ((2, 0, "a", PORT, 1, 1), "--gpus-per-node and --processes-per-node are the same number"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_place_that_cannot_be_is_one_line(case):
    arguments, message = BAD[case]
    with pytest.raises(UserError) as error:
        place_of(*arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("port", "restarts", "highest"), [(80, 0, 65535), (65536, 0, 65535), (65534, 2, 65533), (-1, 0, 65535)])
def test_ports_leave_room_for_the_restarts(port, restarts, highest):
    with pytest.raises(UserError, match=rf"^--main-port {port}: it has to lie between 1024 and {highest}"):
        Place(port=port).check(Supervision(restarts))


def test_the_highest_port_that_leaves_room_is_taken():
    Place(port=65533).check(Supervision(2))


def test_a_port_in_use_is_named_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^--main-port {port}: in use on this host"):
            Place(2, 0, "127.0.0.1", port).check(Supervision())
        Place(2, 1, "127.0.0.1", port).check(Supervision())  # only node 0 listens


def test_an_unknown_host_is_named(monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"^--main-address nohost: no host of this name is known here"):
        Place(2, 1, "nohost").check(Supervision())


def test_a_name_that_no_host_can_have_is_named():
    with pytest.raises(UserError, match=r"^--main-address node\.\.cluster: no host of this name is known here"):
        Place(2, 1, "node..cluster").check(Supervision())


def test_more_gpus_than_the_node_has_are_refused(monkeypatch):
    monkeypatch.setattr(nodes, "gpus", lambda: 2)
    with pytest.raises(UserError, match=r"^--gpus-per-node 4: this node has 2 GPUs"):
        Place(2, 1, "127.0.0.1", per_node=4, on_gpus=True).check(Supervision())
    with pytest.raises(UserError, match=r"^--processes-per-node 3: this node has 2 GPUs"):
        Place(2, 1, "127.0.0.1", per_node=3).check(Supervision())


def test_the_interface_to_this_host_is_the_loopback():
    assert interface_to("127.0.0.1") == "lo"


def test_gloo_and_nccl_are_told_their_interface_unless_the_user_has(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert network(Place(2, 1, "127.0.0.1")) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert network(Place()) == {}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert network(Place(2, 1, "127.0.0.1")) == {"NCCL_SOCKET_IFNAME": "=lo"}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert network(Place(2, 1, "127.0.0.1")) == {}


def test_the_command_for_a_node_can_be_read_back_by_the_command_line():
    words = node_command(["recipe.yaml", "--runs", "/runs"], Place(2, 1, "a", 29600, 4, on_gpus=True))
    assert words[1:6] == ["-m", "launch.cli", "launch", "recipe.yaml", "--runs"]
    assert [value(words, f"--{name}") for name in ("nodes", "node-rank", "main-address", "main-port", "gpus-per-node")] == [
        *("2", "1", "a", "29600", "4")
    ]


def test_threads_are_shared_by_the_ranks_of_one_node_only(stage, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local, "cores", lambda: 8)
    assert value(command(stage(), [], Place(4, 0, "a", per_node=2)), "--num_cpu_threads_per_process") == "4"
