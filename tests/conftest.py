"""What several test files share: small models, and how hypothesis draws its examples."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny  # noqa: F401  registers its model
import torch
from filelock import FileLock
from hypothesis import settings
from safetensors.torch import save_file
from timm.models import VisionTransformer
from traces import traced_once

import lowpass.benchmarks.latency.timing
from lowpass.pipeline.base.allocator import keep_freed_memory
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.finetune import finetune_run
from lowpass.pipeline.run.recipe import make_recipe

keep_freed_memory()
torch.set_num_threads(1)  # test processes run side by side, and a tiny model gains nothing from a second thread

# The same examples on every run and every machine, however slow.
settings.register_profile("lowpass", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lowpass")

MakeViT = Callable[..., VisionTransformer]
MadeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session", autouse=True)
def no_warm_up() -> Iterator[None]:
    """What tests time is not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowpass.benchmarks.latency.timing, "WARM_UP_S", 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def traces(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[None]:
    """See `traces.py`."""
    with traced_once(shared_folder(tmp_path_factory, worker_id)):
        yield


def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One for all test processes."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def make_vit() -> MakeViT:
    """A factory of small dense ViTs: 16 tokens of 24 channels, 2 blocks of 3 heads, 5 classes unless told otherwise."""

    def make(kind: type[VisionTransformer] = VisionTransformer, seed: int = 0, **changes: Any) -> VisionTransformer:
        small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
        torch.manual_seed(seed)
        model = kind(**(small | changes))
        with torch.no_grad():  # timm starts biases at zero and scales at a constant, where a mix-up would not show
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def digits_slim() -> SlimViT:
    """The embedded digits model with nothing removed yet. Shared: copy it before changing it."""
    return SlimViT.from_timm(load_model("digits_deit"))


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The options that name the model of `tiny.py` with some weights: a search of it takes a second."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    model = timm.create_model("tiny_deit")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return {"model": "tiny_deit", "weights": path}


# Every kind of block: heads dropped, query/key and value of unequal sizes, tokens dropped, and one left alone. Mild
# enough to leave margins that say what a precision costs.
SLIM_BLOCKS = [
    {"heads": 3, "qk_dim": 32, "v_dim": 32, "hidden": 384, "keep": 64},
    {"heads": 3, "qk_dim": 17, "v_dim": 30, "hidden": 301, "keep": 64},
    {"heads": 2, "qk_dim": 32, "v_dim": 21, "hidden": 300, "keep": 60},
    {"heads": 3, "qk_dim": 24, "v_dim": 32, "hidden": 311, "keep": 56},
    {"heads": 3, "qk_dim": 9, "v_dim": 14, "hidden": 300, "keep": 48},
    {"heads": 1, "qk_dim": 30, "v_dim": 31, "hidden": 384, "keep": 40},
]


@pytest.fixture(scope="session")
def slim_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An architecture file for the digits model."""
    path = tmp_path_factory.mktemp("table") / "table.json"
    path.write_text(json.dumps({"blocks": SLIM_BLOCKS}))
    return path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> MadeOnce:
    """A directory by name, made by whichever test process asks first and shared by all. Copy it before changing it."""
    shared = shared_folder(tmp_path_factory, worker_id)

    def directory(name: str, make: Callable[[Path], None]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                unfinished = tmp_path_factory.mktemp(name) / name
                make(unfinished)
                unfinished.rename(shared / name)
        return shared / name

    return directory


@pytest.fixture(scope="session")
def first_slim_run(slim_table: Path, made_once: MadeOnce) -> Path:
    """The digits model, cut to `SLIM_BLOCKS`."""
    recipe = make_recipe(model="digits_deit", data="digits", architecture=slim_table, score_images=512)
    return made_once("slim-run", lambda directory: compress(recipe, directory))


@pytest.fixture(scope="session")
def first_tuned_run(first_slim_run: Path, made_once: MadeOnce) -> Path:
    """The same, fine-tuned a little: before that margins are too narrow to say what a precision costs."""

    def make(directory: Path) -> None:
        shutil.copytree(first_slim_run, directory)
        finetune_run(directory, None, {"epochs": 1}, None)

    return made_once("tuned-run", make)


@pytest.fixture(scope="module")
def slim_run(first_slim_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of `first_slim_run`; every test file gets one of its own."""
    return Path(shutil.copytree(first_slim_run, tmp_path_factory.mktemp("run") / "digits"))


@pytest.fixture(scope="module")
def tuned_run(first_tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of `first_tuned_run`; every test file gets one of its own."""
    return Path(shutil.copytree(first_tuned_run, tmp_path_factory.mktemp("tuned") / "digits"))


@pytest.fixture(scope="module")
def run(slim_run: Path) -> Path:
    """A `slim_run` that can be deployed: its FP32 export is there."""
    from served import exported  # here, for it takes what tests of serving alone need

    exported(slim_run, "fp32")
    return slim_run


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Where a test deploys to; it is not there yet."""
    return tmp_path / "repo"
