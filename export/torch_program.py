"""The slim model as a program of `torch.export`: one file that plain PyTorch loads, without lowpass.

    program = torch.export.load("model.fp32.pt2").module()
    logits = program(images)  # [B, C, H, W] FP32, any B -> [B, classes]

It is the model as it is, not the deployment graph: the same operations in the same order, and so the same logits.
"""

import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowpass.export.onnx.bounds import Bound
from lowpass.export.onnx.compared import compared
from lowpass.export.onnx.file import weights_path
from lowpass.export.onnx.verify import Verification, note
from lowpass.export.runtimes.session import Images
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.files import sha256, write_bytes
from lowpass.pipeline.base.progress import quiet, track
from lowpass.pipeline.model.slim_vit import SlimViT

BOUND = Bound(1e-6, 1.0, 100.0, 0.0)  # of the largest logit, on every image
METADATA_FILE = "metadata.json"  # in the archive: `torch.export.load(file, extra_files={"metadata.json": ""})`


def program_path(directory: Path, dense: bool = False) -> Path:
    """`model.fp32.pt2`, or `dense.fp32.pt2` for the model it came from."""
    return directory / f"{'dense' if dense else 'model'}.fp32.pt2"


def export_program(
    directory: Path, batches: Sequence[tuple[Tensor, Tensor]], made_images: bool = False, dense: bool = False
) -> Verification:
    """Export a run's slim (or dense) model, load it again, compare it with the model, and only then write it.

    Args:
        directory: the run.
        batches: (images [B, C, H, W], labels); labels are not looked at.
        made_images: the images are noise, which is written down.
        dense: the dense model instead.

    Raises:
        InputError: the run holds no such model.
        RunError: the program disagrees with the model; it is not written.
    """
    weights, path = weights_path(directory, dense), program_path(directory, dense)
    model = SlimViT.load(directory, weights.name).requires_grad_(False)
    content = serialise(model, sha256(weights))
    seen = (np.ascontiguousarray(images.numpy()) for images, _ in track(batches, f"verifying {path.name}"))
    every = compared(TorchProgram(content), model, seen, BOUND)
    verification = Verification(
        file=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        runtime="pytorch",
        images=len(every.differences),
        made_images=made_images,
        largest_difference=float(every.differences.max()),
        usual_difference=float(every.differences.max()),
        largest_logit=every.largest_logit,
        same_top1=100 * float(every.same.mean()),
        ties=0,
        outliers=int((every.differences > BOUND.difference * every.largest_logit).sum()),
    )
    if verification.outliers:
        raise RunError(
            f"{path.name}: a logit differs by {verification.largest_difference:.2e} from the model's, on "
            f"{verification.outliers} of {verification.images} images by more than {BOUND.difference:g} of the largest "
            "logit; it was not written"
        )
    write_bytes(path, content)
    note(directory, verification)
    return verification


def serialise(model: SlimViT, weights: str) -> bytes:
    """A model as a `.pt2` archive; the same weights, of the hash `weights`, give the same bytes."""
    architecture = model.architecture
    dense = architecture.dense
    example = torch.zeros(2, dense.in_chans, *dense.img_size)
    with warnings.catch_warnings(), quiet("torch.export"):
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    metadata = {
        "model": dense.name,
        "num_classes": dense.num_classes,
        "input_size": [dense.in_chans, *dense.img_size],
        "preprocessing": architecture.preprocessing.model_dump(mode="json"),
        "weights_sha256": weights,
    }
    archive = io.BytesIO()
    torch.export.save(program, archive, extra_files={METADATA_FILE: json.dumps(metadata)})
    return archive.getvalue()


def made_from(path: Path) -> str | None:
    """The SHA-256 of the weights that a file of `serialise` was made from; None: it is none, or cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(f"extra/{METADATA_FILE}")]
            return str(json.loads(archive.read(name))["weights_sha256"])
    except (OSError, ValueError, LookupError, zipfile.BadZipFile):
        return None


class TorchProgram:
    """The archive as a `Session`, on the CPU, where the model is."""

    def __init__(self, content: bytes) -> None:
        self.model: Any = torch.export.load(io.BytesIO(content)).module()

    def load(self, images: Images) -> None:
        """See `Session`."""
        self.images = torch.from_numpy(images)

    @torch.inference_mode()
    def run(self) -> None:
        """See `Session`."""
        self.output: Tensor = self.model(self.images)

    def logits(self) -> Images:
        """See `Session`."""
        return self.output.numpy()
