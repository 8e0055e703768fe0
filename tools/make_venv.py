"""Creates a virtual environment with pip, or prints in one line what is missing: make_venv.py FOLDER.

Runs with any `python3`, without installed packages. A working environment is not changed. If Python has no
ensurepip (a separate package on Debian), the interpreter's pip installs pip into the environment.
"""

import os
import shutil
import subprocess
import sys

OLDEST = (3, 10)


def fail(message):
    sys.exit("make: " + message)


def has_pip(python):
    return (
        os.path.exists(python)
        and subprocess.call([python, "-c", "import pip"], stderr=subprocess.DEVNULL) == 0
    )


def main(folder):
    if sys.version_info < OLDEST:
        here = ".".join(map(str, sys.version_info[:2]))
        fail("Python 3.10 or later is needed, and this is " + here + "; set MINILM_PYTHON to another one")
    python = os.path.join(folder, "bin", "python")
    if has_pip(python):
        return
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    try:
        import venv
    except ImportError:
        fail("this Python has no venv module (on Debian and Ubuntu: apt install python3-venv)")
    try:
        import ensurepip  # noqa: F401

        venv.create(folder, with_pip=True)
    except ImportError:
        venv.create(folder, with_pip=False)
        pip = [sys.executable, "-m", "pip", "--python", python]
        if subprocess.call([*pip, "install", "--quiet", "pip"]) != 0:
            shutil.rmtree(folder, ignore_errors=True)
            fail("this Python has neither ensurepip nor pip (on Debian and Ubuntu: apt install python3-venv)")


if __name__ == "__main__":
    main(sys.argv[1])
