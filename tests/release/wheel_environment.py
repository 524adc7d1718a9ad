"""A fresh virtual environment with an installed wheel, as users without a checkout have."""

from __future__ import annotations

import os
import subprocess
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input", "install")
# Variables of a checkout or of the caller's shell, which a user does not have.
_LEFT_OUT = ("PYTHONPATH", "VIRTUAL_ENV", "RAY_AUTH_MODE", "RAY_ADDRESS", "SVFAP_LOG")


class WheelEnvironment:
    """A virtual environment, and a working folder with an exported network and videos.

    Args:
        folder: Folder to create it in, outside of the checkout.
    """

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self._bin = folder / "venv" / "bin"
        self._variables = {key: os.environ[key] for key in os.environ if key not in _LEFT_OUT}
        self.work.mkdir(parents=True)
        venv.create(folder / "venv", with_pip=True)
        with tarfile.open(ROOT / "tests" / "compat" / "data.tar.xz") as tar:
            tar.extractall(self.work)  # no filter: Debian 12's Python has none

    @property
    def python(self) -> Path:
        """Interpreter of the environment."""
        return self._bin / "python"

    def install(self, wheel: Path, extras: str = "") -> None:
        """Install a wheel with the versions of constraints.txt.

        Args:
            wheel: Path of the wheel.
            extras: Names of extras, separated by commas.

        Raises:
            RuntimeError: If pip fails, with its message.
        """
        package = f"{wheel}[{extras}]" if extras else str(wheel)
        pinned = ("-c", str(ROOT / "constraints.txt"), "torch==2.13.0")
        done = self._run(str(self.python), *_PIP, *pinned, package)
        if done.returncode:
            raise RuntimeError(f"pip cannot install {package}:\n{done.stderr}")

    def svfap(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the installed `svfap` in the working folder.

        Args:
            *words: Arguments of the command line.
        """
        return self._run(str(self._bin / "svfap"), *words)

    def run_python(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python in the working folder.

        Args:
            *words: Arguments of the interpreter.
        """
        return self._run(str(self.python), *words)

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.work,
            env=self._variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )
