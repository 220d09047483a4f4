"""The house as a user gets it: one import name in the wheel, beside whatever the user's own folders are called."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from functools import cache
from pathlib import Path

import grimp
import pytest
from conftest import SLIM_BLOCKS
from packaging.metadata import Metadata

from lowpass.pipeline.base.version import __version__

ROOT = Path(__file__).parent.parent
USE = """
import json, sys
import benchmarks, export, pipeline                       # the user's own
import lowpass

assert {pipeline.WHOSE, export.WHOSE, benchmarks.WHOSE} == {"mine"}
run = lowpass.compress("digits_deit", "digits", "runs/api", architecture="table.json", score_images=16, batch_size=16)
images = lowpass.lowpass_images(__import__("torch").zeros(2, 3, 32, 32), 0.1)
shape, file = list(run.slim(images).shape), run.export("fp32").name
print(json.dumps({"lowpass": lowpass.__file__, "logits": shape, "file": file}))
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release would be, from the files that git tracks."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    tar = subprocess.run(["tar", "c", "--null", "-T", "-"], cwd=ROOT, input=tracked, capture_output=True, check=True)
    subprocess.run(["tar", "x"], cwd=source, input=tar.stdout, check=True)
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    ran = [sys.executable, "-c", build, str(built)]
    done = subprocess.run(ran, cwd=source, check=True, capture_output=True, text=True)
    assert "warning" not in (done.stdout + done.stderr).lower()
    (file,) = built.glob("lowpass_vit-*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist alone."""
    built = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(built), str(sdist)], check=True, capture_output=True)
    (file,) = built.glob("lowpass_vit-*.whl")
    return file


def test_what_a_release_says_of_itself_is_valid(sdist: Path, wheel: Path) -> None:
    """As an index would judge it: metadata, readme and licence, the same in both."""
    name = f"lowpass_vit-{__version__}"
    with zipfile.ZipFile(wheel) as opened:
        assert opened.testzip() is None
        told = opened.read(f"{name}.dist-info/METADATA")
        assert f"{name}.dist-info/licenses/LICENSE" in opened.namelist()
    with tarfile.open(sdist) as archive:
        files = set(archive.getnames())
        inside = archive.extractfile(f"{name}/PKG-INFO")
        assert inside is not None and inside.read() == told
    metadata = Metadata.from_email(told, validate=True)
    assert (metadata.name, str(metadata.version)) == ("lowpass-vit", __version__)
    assert metadata.license_expression == "Apache-2.0" and metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text()
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(metadata.provides_extra or ()) == set(wanted["optional-dependencies"])
    beside = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "pyproject.toml"}
    assert {f"{name}/{file}" for file in beside} <= files
    assert not [file for file in files if file.startswith((f"{name}/tests", f"{name}/pipeline"))]


def test_the_wheel_holds_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"lowpass", "lowpass_vit"}
    for room in (
        "pipeline/method/sensitivity",
        "export/onnx/verify",
        "benchmarks/peers/tome",
        "commands/compress",
        "api",
    ):
        assert f"lowpass/{room}.py" in names
    assert "lowpass/pipeline/checkpoints/weights/digits_deit.safetensors" in names
    assert "lowpass/recipes/deit_small_paper.json" in names
    assert {"lowpass/report/templates/page.html", "lowpass/report/templates/style.css"} <= set(names)
    assert {f"lowpass/export/triton/page/dashboard.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert zipfile.ZipFile(wheel).getinfo("lowpass/export/triton/backend/stub.sh").external_attr >> 16 & 0o111 == 0o111
    assert not [name for name in names if "/results/" in name or "/tests/" in name]


def test_it_works_beside_folders_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python3.*/site-packages")
    # What lowpass needs is taken from this environment, without the lowpass that is installed there.
    (site / "needed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    project = tmp_path / "project"
    for name in ("pipeline", "export", "benchmarks"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("WHOSE = 'mine'\n")
    (project / "table.json").write_text(json.dumps({"blocks": SLIM_BLOCKS}))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def ran(*command: str) -> str:
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    used = json.loads(ran(str(python), "-c", USE))
    assert Path(used["lowpass"]).is_relative_to(site)
    assert used["logits"] == [2, 10] and used["file"] == "model.fp32.onnx"
    command = str(tmp_path / "env" / "bin" / "lowpass")
    options = (
        "--data",
        "digits",
        "--architecture",
        "table.json",
        "--score-images",
        "16",
        "--batch-size",
        "16",
        "--json",
    )
    told = json.loads(ran(command, "compress", "--model", "digits_deit", "--out", "runs/command", *options))
    for name in ("slim.safetensors", "architecture.json"):
        assert (project / "runs/api" / name).read_bytes() == (project / "runs/command" / name).read_bytes()
    assert told["slim"]["macs"] < told["dense"]["macs"]


def test_the_search_is_understood_from_a_dozen_files() -> None:
    """The deepest chain of imports from the search down is under 12 files; no file is over 400 lines."""
    graph = grimp.build_graph("lowpass")

    @cache
    def depth(module: str) -> int:
        return 1 + max(map(depth, graph.find_modules_directly_imported_by(module)), default=0)

    assert 5 < depth("lowpass.pipeline.search.search") < 12
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in tracked.split()}
    assert len(lines) > 200 and not {name: count for name, count in lines.items() if count > 400}
