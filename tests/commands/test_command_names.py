"""`python -m fastsimgan NAME` for a name that is no command's."""

import subprocess
import sys


def test_a_misspelt_command_exits_2_with_the_nearest_name():
    done = subprocess.run([sys.executable, "-m", "fastsimgan", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.count("\n") == 1 and "did you mean train?" in done.stderr
