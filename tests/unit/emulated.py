"""A CPU without VNNI, emulated: what int8 kernels do there can be seen on any x86 machine.

`python -m tests.unit.emulated install` installs the emulator (as root, on Debian or Ubuntu).
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CPU = "Haswell"
"""Has AVX2, and neither AVX-512 nor VNNI."""


PRELUDE = "import sys, pathlib, engine.cpu; engine.cpu.CPUINFO = pathlib.Path(sys.argv.pop(1)); "
"""An emulated process reads of the real CPU in /proc/cpuinfo; it is given another file."""


def run_emulated(directory, code, *arguments):
    """Returns what Python `code` prints on that CPU; skips the test where there is no emulator.

    Args:
        directory: of the test.
        arguments: sys.argv[1:] of the code.
    """
    emulator = shutil.which("qemu-x86_64")
    if platform.machine() != "x86_64":
        pytest.skip("this Python is not one for x86-64")
    if emulator is None:
        pytest.skip("no qemu-x86_64 to emulate a CPU without VNNI: python -m tests.unit.emulated install")
    cpuinfo = directory / "cpuinfo"
    cpuinfo.write_text("flags : avx2\n")
    command = [emulator, "-cpu", CPU, sys.executable, "-c", PRELUDE + code, str(cpuinfo), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def install():
    """Installs the emulator when it is missing."""
    if shutil.which("qemu-x86_64"):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit("qemu-x86_64 is not installed here: that takes root and apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "qemu-user"]
    if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
        subprocess.run(["apt-get", "update", "-qq"], env=environment, check=True)
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit("usage: python -m tests.unit.emulated install")
    install()
