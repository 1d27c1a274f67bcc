"""What the tests of the command line share."""

import pytest

from launch import cli


@pytest.fixture
def call(capfd):
    """Runs `bothways …` in this process; returns (exit status, stdout, stderr)."""

    def call(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return stop.value.code or 0, out, err

    return call
