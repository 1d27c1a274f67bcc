"""The real tritonserver, from the nvidia-pytriton wheel in a virtual environment of its own (it needs NumPy 1).

`python -m tests.serving.triton_server install` makes the environment. That wheel has only Triton's python backend; Triton's
python-based backends let `onnx_backend.py` take the places of `onnxruntime` and `tensorrt`, so that a repository is loaded as
it is.
"""

import contextlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import uuid
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-triton"
INSTALLED = ENVIRONMENT / ".installed"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
PACKAGES = ENVIRONMENT / "lib" / PYTHON / "site-packages"
BINARIES = PACKAGES / "pytriton" / "tritonserver"
STUB = BINARIES / "python_backend_stubs" / PYTHON.removeprefix("python") / "triton_python_backend_stub"
START_SECONDS = 60


def requirements():
    """Tokenizing and inference are those of the main environment, so that results can be compared to the bit."""
    same = [f"{name}=={importlib.metadata.version(name)}" for name in ("tokenizers", "onnxruntime")]
    return ["nvidia-pytriton==0.7.0", "numpy<2", *same]


def install():
    """Makes the environment when it is missing or was made for other versions."""
    wanted = "\n".join(requirements())
    if INSTALLED.exists() and INSTALLED.read_text() == wanted:
        return
    if not (ENVIRONMENT / "bin" / PYTHON).exists():
        venv.create(ENVIRONMENT, with_pip=True, symlinks=True, clear=True)
    pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    subprocess.run([*pip, *requirements()], check=True)
    INSTALLED.write_text(wanted)


def environment():
    """Variables with which tritonserver and its python stub find their libraries and the packages."""
    libraries = [sysconfig.get_config_var("LIBDIR"), str(PACKAGES / "nvidia_pytriton.libs")]
    return {
        **os.environ,
        "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(PACKAGES),
        "LD_LIBRARY_PATH": ":".join(libraries),
    }


def why_not():
    """Returns why tritonserver cannot run here, or None."""
    if not INSTALLED.exists():
        return f"{ENVIRONMENT.name} is not installed: python -m tests.serving.triton_server install"
    if not STUB.exists():
        return f"nvidia-pytriton has no python stub for {PYTHON}"
    for program in (BINARIES / "bin" / "tritonserver", STUB):
        found = subprocess.run(["ldd", program], env=environment(), capture_output=True, text=True)
        missing = [line.split()[0] for line in found.stdout.splitlines() if "not found" in line]
        if found.returncode or missing:
            return f"{program.name} lacks {', '.join(missing) or found.stderr.strip()}"
    return None


def make_backends(directory):
    """Writes a backend directory: python, and the two that run ONNX."""
    python = directory / "python"
    shutil.copytree(BINARIES / "backends" / "python", python)
    shutil.copy(STUB, python)
    for name in ("onnxruntime", "tensorrt"):
        (directory / name).mkdir()
        shutil.copy(Path(__file__).with_name("onnx_backend.py"), directory / name / "model.py")


def free_port():
    """Returns a port that was free a moment ago; tritonserver cannot choose one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RejectedError(Exception):
    """Triton did not start; the message is its log."""


@contextlib.contextmanager
def triton(repository, work):
    """Runs tritonserver on a copy of a model repository; yields (HTTP address, gRPC address).

    A copy, because Triton's python backend writes bytecode beside model.py.

    Raises:
        RejectedError: it refuses a model.
    """
    models, backends, log = work / "models", work / "backends", work / "triton.log"
    shutil.copytree(repository, models)
    make_backends(backends)
    http, grpc, prefix = free_port(), free_port(), f"bothways_test_{uuid.uuid4().hex[:12]}"
    command = [
        BINARIES / "bin" / "tritonserver",
        f"--model-repository={models}",
        f"--backend-directory={backends}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        *("--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
        *("--allow-metrics=false", "--exit-on-error=true", "--exit-timeout-secs=3", "--disable-auto-complete-config"),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, http, log)
        yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for left in Path("/dev/shm").glob(f"{prefix}*"):
            left.unlink(missing_ok=True)  # its stub may be as fast


def _wait_until_ready(process, port, log):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RejectedError(log.read_text())
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).status == 200:
                return
        time.sleep(0.1)
    raise RejectedError(f"not ready after {START_SECONDS} s:\n{log.read_text()}")


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit("usage: python -m tests.serving.triton_server install")
    try:
        install()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{ENVIRONMENT.name} could not be made, the tests with tritonserver will be skipped: {error}")
