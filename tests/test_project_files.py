"""The files beside the code say what the code is: one version, a citation, extras, an image that can be built."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from lowpass.pipeline.base.version import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_there_is_one_version() -> None:
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    newest = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert newest == __version__


def test_the_citation_names_software_and_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (cited["cff-version"], cited["type"], cited["license"]) == ("1.2.0", "software", PROJECT["license"])
    (paper,) = cited["references"]
    assert paper["title"].startswith("VTC-LFC") and paper["year"] == 2022
    assert paper["authors"][0] == {"family-names": "Wang", "given-names": "Zhenyu"}
    assert all({"type", "title", "authors"} <= set(one) for one in cited["references"])


def test_every_extra_is_documented() -> None:
    text = (ROOT / "docs" / "install.md").read_text()
    for extra in PROJECT["optional-dependencies"]:
        assert f"| `{extra}` |" in text


def test_the_image_is_well_written_and_what_it_names_is_there() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (ROOT / "Dockerfile").read_text()
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    (constraints,) = re.findall(r"--constraint /src/(\S+)", text)
    assert (ROOT / constraints).exists()
    (tag,) = re.findall(r"^ARG CUDA_TAG=(\S+)$", text, re.MULTILINE)
    assert f'"CUDA" of NVIDIA\'s container catalogue, tag {tag}:' in text
    (toolkit,) = re.findall(r"^cuda-toolkit==(\d+\.\d+)", (ROOT / constraints).read_text(), re.MULTILINE)
    assert tag.startswith(f"{toolkit}.")  # the CUDA that PyTorch brings needs a driver as new as the base's
    for name in re.findall(r"\(([\w./-]+\.md)\)", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / name).exists()


def test_issue_templates_are_read() -> None:
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert len(templates) == 2
    for path in templates:
        _, head, body = path.read_text().split("---\n", 2)
        assert {"name", "about", "labels"} <= set(yaml.safe_load(head)) and "lowpass" in body
