"""File systems of a test's own."""

import subprocess

import pytest


def private_mounts() -> list[str]:
    """How to get mounts of one's own: as root, or as root of a user namespace."""
    for command in (["unshare", "--mount"], ["unshare", "--mount", "--user", "--map-root-user"]):
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("this system allows no mounts of one's own, which a full disk needs")
