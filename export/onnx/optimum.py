"""A folder that Optimum opens: the ONNX file with its input called as Transformers calls it, beside the two files that
say what the classes are and how a picture is prepared.

    from optimum.onnxruntime import ORTModelForImageClassification
    model = ORTModelForImageClassification.from_pretrained("runs/small/model.fp32.optimum")
"""

from pathlib import Path
from typing import Any

import onnx

from lowpass.export.onnx.file import current_onnx, onnx_path, weights_path
from lowpass.export.options import Precision
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_bytes, write_json
from lowpass.pipeline.checkpoints.huggingface import PREPROCESSOR, RESAMPLING
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.classes import load_classes
from lowpass.pipeline.model.slim_vit import CONFIG_FILE, SlimViT

MODEL_FILE = "model.onnx"  # which Optimum looks for
INPUT = "pixel_values"  # which Transformers' image processors give, and Optimum passes on


def optimum_path(directory: Path, precision: Precision, dense: bool = False) -> Path:
    """The folder `model.<precision>.optimum`, or `dense.<precision>.optimum` for the model it came from."""
    return onnx_path(directory, precision, dense).with_suffix(".optimum")


def write_optimum(directory: Path, precision: Precision, dense: bool = False) -> Path:
    """Make the folder from the file that `export` wrote; each of its files is written whole or not at all.

    Raises:
        InputError: nothing current is exported, or Transformers cannot prepare pictures so.
    """
    exported, folder = current_onnx(directory, precision, dense), optimum_path(directory, precision, dense)
    architecture = SlimViT.load(directory, weights_path(directory, dense).name).architecture
    processor = processor_of(architecture)
    write_json(folder / CONFIG_FILE, config_of(architecture, load_classes(directory, architecture.dense.num_classes)))
    write_json(folder / PREPROCESSOR, processor)
    write_bytes(folder / MODEL_FILE, _with_input(onnx.load_model_from_string(exported.read_bytes()), INPUT))
    return folder


def config_of(architecture: Architecture, classes: tuple[str, ...]) -> dict[str, Any]:
    """`config.json`: the classes, and the dense model in the words of Transformers' ViT. No such model is built of it;
    what runs is the ONNX file."""
    dense = architecture.dense
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "image_size": dense.img_size[0] if dense.img_size[0] == dense.img_size[1] else list(dense.img_size),
        "patch_size": dense.patch_size[0] if dense.patch_size[0] == dense.patch_size[1] else list(dense.patch_size),
        "num_channels": dense.in_chans,
        "hidden_size": dense.embed_dim,
        "intermediate_size": dense.hidden,
        "num_hidden_layers": dense.depth,
        "num_attention_heads": dense.num_heads,
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def processor_of(architecture: Architecture) -> dict[str, Any]:
    """`preprocessor_config.json`: timm's preparation in the words of an image processor that resizes, then crops.

    Raises:
        InputError: it has no words for this one.
    """
    dense, prep = architecture.dense, architecture.preprocessing
    height, width = dense.img_size
    numbers = {name: number for number, name in RESAMPLING.items()}
    obstacle = None
    if dense.in_chans != 3:
        obstacle = f"pictures of {dense.in_chans} channel{'s' * (dense.in_chans > 1)}"
    elif prep.interpolation not in numbers:
        obstacle = f"{prep.interpolation} resizing"
    elif prep.crop_mode == "border" or (prep.crop_mode == "center" and height != width):
        obstacle = f"crops of mode {prep.crop_mode!r} to {height}x{width}"
    if obstacle is not None:
        raise InputError(f"Transformers' image processors have no words for {obstacle}: --format optimum is not for it")
    before = [int(side / prep.crop_pct) for side in (height, width)]
    squash = prep.crop_mode == "squash"
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": before[0], "width": before[1]} if squash else {"shortest_edge": before[0]},
        "resample": numbers[prep.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(prep.mean),
        "image_std": list(prep.std),
    }


def _with_input(model: onnx.ModelProto, name: str) -> bytes:
    """The same graph, whose only input is called `name`."""
    (given,) = model.graph.input
    for node in model.graph.node:
        for index, read in enumerate(node.input):
            if read == given.name:
                node.input[index] = name
    given.name = name
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)
