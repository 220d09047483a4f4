"""`load_model`: whatever people bring, as a dense timm ViT."""

from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.files import INDEX, index_files
from lowpass.pipeline.checkpoints.huggingface import PREPROCESSOR, from_huggingface, read_processor
from lowpass.pipeline.checkpoints.origin import Choices, Origin, labels, mark, origin_of, set_preprocessing
from lowpass.pipeline.checkpoints.shape import parse_size
from lowpass.pipeline.checkpoints.state_dict import Tensors, find_tensors, read_weights
from lowpass.pipeline.checkpoints.timm_models import CONFIG, by_name, from_hub_folder, read_config
from lowpass.pipeline.checkpoints.torchvision_models import NAMES, from_torchvision
from lowpass.pipeline.model.hub import download
from lowpass.pipeline.model.slim_vit import ARCHITECTURE_FILE

# A folder's weights, the first that is there.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors" + INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX,
    "model.pth",
    "pytorch_model.pth",
)


def load_model(
    model: str,
    weights: Path | str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    *,
    weights_key: str | None = None,
    img_size: str | int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> nn.Module:
    """A dense model as a timm ViT in evaluation mode.

    Args:
        model: a timm name, with or without a tag (`digits_deit` brings its own weights); a name of torchvision such as
            `vit_b_16`; a folder that Transformers saved, or one in timm's hub layout; `local-dir:FOLDER`; or
            `hf-hub:NAME`, which is downloaded. Slim models are none of these: `SlimViT.from_pretrained` loads them.
        weights: local checkpoint, `.safetensors` or `.pth`, whatever wraps its tensors. Class count, channels and image
            size are read off it.
        random_weights: create the model untrained, from `seed`, for speed studies.
        seed: see there.
        weights_key: which of several models in the file, such as `state_dict_ema`; None: EMA's where there are any.
        img_size: pixels, or height and width; positions of another size are resampled. None: the checkpoint's.
        in_chans: input channels, where the checkpoint does not tell.
        mean: of preprocessing, a value a channel; None: as the model's source says. So are `std`, `crop_pct` and
            `interpolation`.

    Raises:
        InputError: unknown name, a slim model, no weights, or weights that are damaged, not finite or of another shape.

    Example:
        >>> load_model("digits_deit").num_classes
        10
    """
    size = parse_size(str(img_size)) if isinstance(img_size, str | int) else img_size
    choices = Choices(weights_key, size, in_chans, mean, std, crop_pct, interpolation)
    if weights is not None and random_weights:
        raise InputError("give --weights or --random-weights, not both")
    torch.manual_seed(seed)
    file = None if weights is None else Path(weights)
    if model.startswith("hf-hub:"):
        return _from_hub(model, choices)
    if (folder := _folder_of(model)) is not None:
        try:
            return _from_folder(folder, file, choices)
        except PermissionError as error:
            raise InputError(f"cannot read {error.filename}: {error.strerror}") from None
    if model in NAMES:
        if file is None:
            raise InputError(f"{model} is torchvision's: give its state dict as --weights FILE")
        found = read_weights(file, choices.weights_key)
        return _with_keys(from_torchvision(model, NAMES[model].heads, found.state, file, choices), found)
    return by_name(model, file, random_weights, choices)


def local_files(model: str, weights: Path | None = None) -> list[Path]:
    """The files that `load_model` reads, as far as they are here; none of those that a hub or a package brings."""
    files = [] if weights is None else [weights]
    if not model.startswith("hf-hub:") and (folder := _folder_of(model)) is not None:
        files += [folder / CONFIG, folder / PREPROCESSOR]
        if weights is None:
            files += [folder / name for name in WEIGHT_FILES]
    there = [file for file in files if file.is_file()]
    listed = [index.parent / name for index in there if index.name.endswith(INDEX) for name in index_files(index)]
    return [*there, *(file for file in listed if file.is_file())]


def _folder_of(model: str) -> Path | None:
    """The folder that a model's name is of; None: of none."""
    folder = Path(model.removeprefix("local-dir:"))
    named = model.startswith("local-dir:") or "/" in model or (model and folder.is_dir() and not timm.is_model(model))
    return folder if named else None


def as_timm(model: nn.Module) -> nn.Module:
    """A model in memory as a timm ViT: itself, or converted from Transformers or torchvision.

    Raises:
        InputError: it is a classifier of theirs that lowpass does not take. What timm's it takes `SlimViT` says.
    """
    config: Any = getattr(model, "config", None)
    library = type(model).__module__.partition(".")[0]
    if library == "transformers" and hasattr(config, "to_dict"):
        found = find_tensors(dict(model.state_dict()), Path(type(model).__name__))
        converted = from_huggingface(config.to_dict(), found.state, type(model).__name__, Choices(), None)
        return converted.train(model.training)
    if library == "torchvision" and type(model).__name__ == "VisionTransformer":
        heads = int(model.encoder.layers[0].num_heads)  # type: ignore[index, union-attr]
        state = {name: tensor.float() for name, tensor in model.state_dict().items()}
        return from_torchvision("vit (torchvision)", heads, state, "the model", Choices()).train(model.training)
    return model


def _from_folder(folder: Path, weights: Path | None, choices: Choices) -> nn.Module:
    if not folder.is_dir():
        what = f"{folder} is a file: give it as --weights" if folder.is_file() else f"there is no folder {folder}"
        raise InputError(f"{what}; --model takes a timm name, hf-hub:NAME or a folder with config.json")
    if (folder / ARCHITECTURE_FILE).exists() and not (folder / CONFIG).exists():
        raise _slim(str(folder))
    config = read_config(folder)
    if "architecture" in config:
        return from_hub_folder(folder, choices, config, weights or _weights_in(folder))
    if "model_type" not in config:
        raise InputError(f"{folder / 'config.json'} names neither timm's 'architecture' nor Transformers' 'model_type'")
    found = read_weights(weights or _weights_in(folder), choices.weights_key)
    model = from_huggingface(config, found.state, folder, choices, read_processor(folder))
    return _with_keys(model, found)


def _weights_in(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return folder / name
    raise InputError(f"{folder} holds no weights: none of {', '.join(WEIGHT_FILES)}")


def _from_hub(name: str, choices: Choices) -> nn.Module:
    settings: dict[str, Any] = {"img_size": choices.img_size, "in_chans": choices.in_chans}
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=True, **{key: value for key, value in settings.items() if value is not None}
        )
    except Exception as error:  # whatever the hub's client raises: no network, no such name, a damaged file
        if isinstance(error, EntryNotFoundError) and _is_slim(name):  # the repository is there, `config.json` is not
            raise _slim(name) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot get {name}: {reason}; a folder or a file works without a network") from None
    set_preprocessing(model, f"the config of {name}", {}, choices)
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    classes = labels(names, int(cast(int, model.num_classes)))
    mark(model, Origin(classes, f"the config of {name}" if classes else ""))
    return model.eval()


def _is_slim(name: str) -> bool:
    """Whether a repository of the hub holds a slim model."""
    try:
        return (download(name, [ARCHITECTURE_FILE]) / ARCHITECTURE_FILE).exists()
    except InputError:
        return False


def _slim(name: str) -> InputError:
    return InputError(
        f"{name} is a slim model, not a dense one; load it with lowpass.SlimViT.from_pretrained({name!r})"
    )


def _with_keys(model: nn.Module, found: Tensors) -> nn.Module:
    known = origin_of(model)
    mark(model, Origin(known.classes, known.classes_from, found.key, found.others))
    return model
