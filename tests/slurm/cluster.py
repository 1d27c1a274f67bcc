"""A real Slurm of two nodes, on this machine and for the time of the tests: `python -m tests.slurm.cluster install`.

Every daemon listens on the loopback interface and keeps its files in one directory; nothing of the machine's own is touched.
There is no accounting, no cgroup and no GPU.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from engine.stages.rank import die_with_parent

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
START_SECONDS = 30.0
NODES = 2
CPUS = 4
"""Of each node, as Slurm counts them; several jobs run at a time."""

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job starts again only after this time; below 5 s the default of 120 s is taken.
AuthInfo=socket={directory}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,requeue_setup_env_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=5
MinJobAge=600
InactiveLimit=0
SlurmctldTimeout=5
SlurmdTimeout=10
ReturnToService=2
TCPTimeout=3
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF
"""


def why_not():
    """Returns why no Slurm can run here, or None."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if missing:
        return f"{', '.join(missing)} not installed: python -m tests.slurm.cluster install (as root, on Debian or Ubuntu)"
    if os.geteuid() != 0:
        return "the daemons of Slurm need root"
    return None


def install():
    """Installs the packages if they are missing and that is possible, without letting them start services."""
    if all(shutil.which(name, path=PATH) for name in PROGRAMS):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        sys.exit("Slurm is not installed here: that takes root and apt-get")
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
            subprocess.run(["apt-get", "update", "-qq"], check=True)
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    finally:
        if made:
            policy.unlink()


class Cluster:
    """slurmctld, two slurmd and munged.

    Args:
        directory: for everything that they write.
    """

    def __init__(self, directory):
        self.directory = directory
        self.daemons = []
        self.nodes = [f"n{number}" for number in range(1, NODES + 1)]
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(directory / "slurm.conf")}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.run("scancel", "--user=root", check=False)
        give_up = time.monotonic() + 10
        while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < give_up:
            time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self._steps():
            os.kill(pid, signal.SIGKILL)

    def _start(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "state").mkdir()
        key = self.directory / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        host = socket.gethostname().partition(".")[0]
        ports = free_ports(1 + NODES)
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=1024 State=UNKNOWN"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        text = CONFIGURATION.format(host=host, ports=ports, directory=self.directory, nodes="\n".join(nodes))
        (self.directory / "slurm.conf").write_text(text)
        files = (f"--{name}={self.directory}/munge.{name}" for name in ("socket", "seed-file", "pid-file", "log-file"))
        files = (file.replace("munge.socket", "munge.sock") for file in files)
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *files)
        self._until(
            lambda: subprocess.run(["munge", "-n", "-S", self.directory / "munge.sock"], capture_output=True).returncode == 0
        )
        self._daemon("slurmctld", "-D", "-c")
        for name in self.nodes:
            self._daemon("slurmd", "-D", "-N", name)
        self._until(
            lambda: self.run("sinfo", "--noheader", "-N", "-p", "all", "-o", "%T", check=False).split() == ["idle"] * NODES
        )

    def _daemon(self, name, *arguments):
        with (self.directory / f"{name}.out").open("ab") as log:
            command = [shutil.which(name, path=PATH), *arguments]
            self.daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent
                )
            )

    def _until(self, ready):
        give_up = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > give_up or any(daemon.poll() is not None for daemon in self.daemons):
                logs = [*self.directory.glob("*.out"), *self.directory.glob("*.log")]
                raise RuntimeError("Slurm did not come up:\n" + "\n".join(path.read_text()[-2000:] for path in logs))
            time.sleep(0.1)

    def _steps(self):
        """The processes that watch over job steps; they outlive slurmd."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"SLURM_CONF={self.directory / 'slurm.conf'}".encode() in (path / "environ").read_bytes().split(b"\0")
                if ours and (path / "cmdline").read_bytes().startswith(b"slurmstepd"):
                    yield int(path.name)
            except OSError:
                continue

    def run(self, *command, check=True):
        """Runs a command of Slurm's; returns what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


def free_ports(count):
    """Ports that nothing listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit("usage: python -m tests.slurm.cluster install")
    install()
