"""Teachers other than the dense model, paths that are dropped, and trackers that are told."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.data.datasets import load_data, subset
from lowpass.pipeline.model.architecture import Preprocessing
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.finetune import finetune_run
from lowpass.pipeline.train.drop_path import dropped_paths
from lowpass.pipeline.train.teacher import ForeignTeacher

EPOCH = {"epochs": 1, "batch_size": 64, "lr": 4e-3, "mixed_precision": "no"}
Images = tuple[Dataset[Any], Dataset[Any]]


@pytest.fixture(scope="module")
def few(slim_run: Path) -> Images:
    """Of the digits, to train and to test on."""
    data = load_data("digits", SlimViT.load(slim_run).architecture)
    return subset(data.train, range(192)), subset(data.test, range(200))


def trained(slim_run: Path, to: Path, few: Images, **changes: Any) -> bytes:
    shutil.copytree(slim_run, to)
    finetune_run(to, few, EPOCH | changes, 0)
    return (to / "slim.safetensors").read_bytes()


def saved(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.mark.slow
def test_the_dense_model_by_its_name_teaches_the_same(slim_run: Path, tmp_path: Path, few: Images) -> None:
    """And one that takes 3 for 5 teaches otherwise."""
    by_itself = trained(slim_run, tmp_path / "dense", few, distill_weight=0.5)
    assert trained(slim_run, tmp_path / "named", few, distill_weight=0.5, teacher="digits_deit") == by_itself
    other = load_model("digits_deit")
    with torch.no_grad():
        other.head.weight[[3, 5]] = other.head.weight[[5, 3]]  # type: ignore[index, union-attr]
        other.head.bias[[3, 5]] = other.head.bias[[5, 3]]  # type: ignore[index, union-attr]
    named = {"teacher": "digits_deit", "teacher_weights": saved(other, tmp_path / "other.safetensors")}
    assert trained(slim_run, tmp_path / "other", few, distill_weight=0.5, **named) != by_itself


@settings(max_examples=10)
@given(
    mean=st.tuples(*3 * [st.floats(0, 1)]),
    std=st.tuples(*3 * [st.floats(0.1, 1)]),
    theirs=st.sampled_from([((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)]),
)
def test_a_teacher_sees_the_pixels_it_was_trained_on(mean: Any, std: Any, theirs: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    model.pretrained_cfg.update(mean=theirs[0], std=theirs[1])
    pixels = torch.rand(2, 3, 64, 64)

    def normalised(values: tuple[Any, Any]) -> Tensor:
        mean_, std_ = (torch.tensor(one)[:, None, None] for one in values)
        return (pixels - mean_) / std_

    student = Preprocessing(mean=mean, std=std, crop_pct=1.0, interpolation="bicubic")
    with torch.inference_mode():
        torch.testing.assert_close(
            ForeignTeacher(model, student)(normalised((mean, std))), model(normalised(theirs)), atol=1e-4, rtol=1e-4
        )


def test_a_teacher_of_one_size_sees_images_of_that_size() -> None:
    student = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bicubic")
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64).eval()
    assert ForeignTeacher(vit, student).size == (64, 64)
    assert ForeignTeacher(vit, student)(torch.zeros(2, 3, 32, 48)).shape == (2, 1000)
    assert ForeignTeacher(timm.create_model("test_resnet"), student).size is None


@pytest.mark.parametrize(
    ("teacher", "model", "said"),
    [
        ("test_resnet", {"num_classes": 7}, "has 7 classes, the student 10"),
        ("test_resnet", {"num_classes": 10, "in_chans": 1}, "is .* but test_resnet has"),
        ("test_resnet", {"num_classes": 10}, r"the teacher test_resnet has a top-1 of .* guessing gives 10\.0 %"),
        ("test_resnet", None, "--teacher test_resnet needs its trained weights: give --teacher-weights FILE"),
        ("nothing", None, "timm has no model 'nothing'"),
        (None, {}, "name it with --teacher"),
    ],
)
def test_refused(
    slim_run: Path, tmp_path: Path, few: Images, teacher: str | None, model: dict[str, Any] | None, said: str
) -> None:
    torch.manual_seed(0)
    asked: dict[str, Any] = {} if teacher is None else {"teacher": teacher}
    if model is not None:
        asked["teacher_weights"] = saved(
            timm.create_model(teacher or "test_resnet", **model), tmp_path / "w.safetensors"
        )
    with pytest.raises(InputError, match=said):
        trained(slim_run, tmp_path / "run", few, **asked)
    assert (tmp_path / "run" / "slim.safetensors").read_bytes() == (slim_run / "slim.safetensors").read_bytes()


@pytest.fixture
def model() -> Iterator[SlimViT]:
    yield SlimViT.from_timm(load_model("digits_deit"))


def test_paths_are_dropped_in_training_alone(model: SlimViT) -> None:
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        whole = model(images)
        with dropped_paths(model, 0.9):
            assert torch.equal(model(images), whole)  # in evaluation mode
            torch.manual_seed(0)
            one = model.train()(images)
            torch.manual_seed(0)
            assert torch.equal(model(images), one) and not torch.equal(model(images), one)
        torch.testing.assert_close(model(images), whole)  # nothing is left of it
        with dropped_paths(model, 0.0):
            torch.testing.assert_close(model(images), whole)


def test_the_first_block_is_always_there(model: SlimViT) -> None:
    """And what stays is scaled up: by so much that the mean is that of the whole."""
    tokens = torch.randn(1, 65, 96).expand(4000, -1, -1)[:, :3]
    with torch.no_grad(), dropped_paths(model.train(), 0.5):
        first, last = model.blocks[0].ls1, model.blocks[-1].ls1
        assert torch.equal(first(tokens), tokens)
        torch.manual_seed(0)
        through = last(tokens)
    kept = through.flatten(1).any(1)
    assert 0.45 < kept.float().mean() < 0.55
    torch.testing.assert_close(through[kept], 2 * tokens[kept])


@pytest.mark.slow
def test_dropped_paths_are_drawn_by_the_seed(slim_run: Path, tmp_path: Path, few: Images) -> None:
    one, two = (trained(slim_run, tmp_path / name, few, drop_path=0.3) for name in ("one", "two"))
    assert one == two != trained(slim_run, tmp_path / "none", few)


def test_a_tracker_is_told_what_the_table_says(slim_run: Path, tmp_path: Path, few: Images) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Path(shutil.copytree(slim_run, tmp_path / "run"))
    finetune_run(run, few, EPOCH | {"epochs": 2}, 0, track="tensorboard")
    with (run / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    events = EventAccumulator(str(run / "tracking" / "run")).Reload()
    for figure in ("loss", "lr", "images_per_s"):
        told = [(one.step, one.value) for one in events.Scalars(figure)]
        assert told == [(int(row["epoch"]), pytest.approx(float(row[figure]), rel=1e-5)) for row in rows]


def test_a_tracker_that_is_not_there_is_refused(slim_run: Path, tmp_path: Path, few: Images) -> None:
    run = Path(shutil.copytree(slim_run, tmp_path / "run"))
    with pytest.raises(InputError, match="--track mlflow: it is not installed; pip install mlflow"):
        finetune_run(run, few, EPOCH, 0, track="mlflow")
    assert not (run / "training").exists()
