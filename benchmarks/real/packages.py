"""Labelled pictures from Debian packages, with Debian's own clients and without root."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from lowpass.benchmarks.real.steps import whole_folder
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import PART
from lowpass.pipeline.base.progress import logger

FASHION, CLIPART = "dataset-fashion-mnist", "openclipart-png"


@dataclass(frozen=True)
class Package:
    """A package as it lies on disk: `tree` holds its files as they would lie below `/`."""

    name: str
    version: str
    tree: Path


def fetch(name: str, cache: Path) -> Package:
    """A package by name, downloaded and unpacked below `cache`/packages; what is there already is used as it is.

    Raises:
        InputError: this system has no `apt-get` or `dpkg`, or no list that names the package.
        RunError: the download failed, or the file is damaged.
    """
    folder = cache / "packages"
    archive = _archive(folder, name) or _download(name, folder)
    tree = folder / name
    if not tree.exists():
        with whole_folder(tree) as part:
            done = _run(["dpkg", "-x", str(archive), str(part)])
            if done.returncode:
                raise RunError(f"cannot unpack {archive}: {_last_line(done.stderr)}; remove it and try again")
    return Package(name, unquote(archive.stem.split("_")[1]), tree)


def _archive(folder: Path, name: str) -> Path | None:
    """The package's file, where it is there."""
    return max(folder.glob(f"{name}_*_*.deb"), default=None)


def _download(name: str, folder: Path) -> Path:
    part = folder / f".{name}{PART}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    logger.info("fetching the package %s", name)
    done = _run(["apt-get", "download", name], part)
    if "Unable to locate package" in done.stderr or "has no installation candidate" in done.stderr:
        raise InputError(
            f"apt-get knows no package {name}: its lists are missing or old; `apt-get update` as root gets them, "
            f"or put the package's .deb file into {folder}"
        )
    archive = _archive(part, name)
    if done.returncode or archive is None:
        raise RunError(f"apt-get cannot download {name}: {_last_line(done.stderr)}")
    whole = archive.replace(folder / archive.name)
    part.rmdir()
    return whole


def _run(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C"}  # its words are looked at
    try:
        return subprocess.run(  # noqa: S603 - a list, no shell
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise InputError(
            f"there is no {command[0]}: these pictures come as Debian packages; run this on Debian or a descendant"
        ) from None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
