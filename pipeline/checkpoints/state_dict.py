"""The tensors of a ViT by name, out of whatever a training script wrapped them in."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.checkpoints.files import read_checkpoint

# The patch embedding, by which a ViT is told from what lies beside it: under the names of timm, Hugging Face (two) and
# torchvision.
ANCHORS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "conv_proj.weight",
)
# Classifiers may lie outside a backbone's prefix. The first six are libraries' own names, the others are usual.
HEADS = (
    *("head.", "head_dist.", "classifier.", "cls_classifier.", "distillation_classifier.", "heads."),
    *("fc.", "linear."),
)
PREFIXES = ("module.", "model.", "backbone.", "encoder.")
# What compiling, sharding and checkpointing put between the parts of a name, wherever they were applied.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
COUNTERS = ("total_ops", "total_params")  # thop's
DEPTH = 4  # of tables in tables
FIRST, TEACHER, PLAIN, STUDENT = range(4)  # which weights are taken where there are several
# Lightning's weight averaging saves the average as `state_dict`, and beside it what was averaged.
LAST = ("student", "current_model_state")


@dataclass(frozen=True)
class Tensors:
    """A table of tensors as it was found.

    `state` is under the model's own names, in FP32. `key` says where it lay, such as `state_dict_ema`, and `prefix`
    what its names began with. `others` are the keys of other models in the file; `names` gives each name in the file.
    """

    state: dict[str, Tensor]
    key: str
    prefix: str
    others: tuple[str, ...]
    names: dict[str, str]


def read_weights(path: Path, key: str | None = None) -> Tensors:
    """The weights in a checkpoint file. EMA weights come first, then a teacher's, a plain model's, a student's.

    Args:
        path: `.safetensors` or `.pth`; pickles are read with `weights_only=True`.
        key: which of several models in it, such as `state_dict_ema`; None: the first by that order.

    Raises:
        InputError: missing, truncated, of no known layout, ambiguous, or not finite plain numbers.
    """
    content = read_checkpoint(path)
    found = find_tensors(content, path, key)
    if nameless := next(_nameless(content, "", DEPTH), None):
        logger.warning(
            "weights: %s of %s is an average without names, which is not read: copy it into the model, and save that",
            nameless,
            path.name,
        )
    if found.others:
        logger.info(
            "weights: %s of %s, which holds %s as well (--weights-key chooses)",
            found.key or "the file's own",
            path.name,
            ", ".join(found.others),
        )
    elif found.key:
        logger.info("weights: %s of %s", found.key, path.name)
    return found


def find_tensors(content: Any, path: Path, key: str | None = None) -> Tensors:
    """See `read_weights`; from what the file holds."""
    models = dict(_models(content))
    if any(_has_anchor(table) for table, _ in models.values()):
        models = {name: (table, prefix) for name, (table, prefix) in models.items() if _has_anchor(table)}
    if not models:
        raise InputError(
            f"{path} holds no state dict: no table of tensors by name, alone or under a key such as 'model', "
            "'state_dict' or 'model_ema'"
        )
    if key is None:
        best = min(map(_rank, models))
        chosen = [name for name in models if _rank(name) == best]
        if len(chosen) > 1 and not _same(*(models[name][0] for name in chosen)):
            raise InputError(f"{path} holds several models: {', '.join(chosen)}; choose one with --weights-key")
        key = chosen[0]
    elif key not in models:
        raise InputError(f"{path} has no weights under {key!r} (--weights-key); it has {', '.join(models) or 'none'}")
    table, prefix = models[key]
    names = {timm_key(name): original for name, original in _own_names(table, prefix, path).items()}
    state = {name: _as_fp32(table[original], original, path) for name, original in names.items()}
    return Tensors(state, key, prefix, tuple(name for name in models if name != key), names)


def timm_key(name: str) -> str:
    """DeiT-III's layer scale renamed."""
    return name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")


def eva_key(name: str) -> str:
    """The name in timm's `Eva`, whose layer scale is called as DeiT-III's own was."""
    return name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")


def _models(content: Any) -> Iterator[tuple[str, tuple[dict[str, Tensor], str]]]:
    """Every model in a checkpoint: a key, its table of tensors, and the prefix of its names there."""
    for key, table in _tables(content, "", DEPTH):
        prefixes = sorted(
            {name[: -len(a)] for name in table for a in ANCHORS if name.endswith(a) and _at_a_dot(name, a)}
        )
        if len(prefixes) < 2:
            yield key, (table, prefixes[0] if prefixes else _common_prefix(table))
        else:
            for prefix in prefixes:
                yield ".".join(filter(None, (key, prefix.rstrip(".")))), (table, prefix)


def _tables(content: Any, key: str, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(content, Mapping):
        return
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = {
        _unwrapped(name): value
        for name, value in named.items()
        if isinstance(value, Tensor) and name.rpartition(".")[2] not in COUNTERS
    }
    nested = [(name, value) for name, value in named.items() if isinstance(value, Mapping)]
    if tensors and (not nested or any("." in name for name in tensors)):
        yield key, tensors
    for name, value in nested if depth else ():
        yield from _tables(value, f"{key}.{name}" if key else name, depth - 1)


def _nameless(content: Any, key: str, depth: int) -> Iterator[str]:
    """Where averages lie that torch_ema and diffusers keep as a list."""
    for name, value in content.items() if isinstance(content, Mapping) and depth else ():
        if name == "shadow_params" and isinstance(value, list | tuple):
            yield f"{key}{name}"
        yield from _nameless(value, f"{key}{name}.", depth - 1)


def _at_a_dot(name: str, anchor: str) -> bool:
    return len(name) == len(anchor) or name[-len(anchor) - 1] == "."


def _has_anchor(table: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(anchor) and _at_a_dot(name, anchor) for name in table for anchor in ANCHORS)


def _common_prefix(table: Mapping[str, Tensor]) -> str:
    """What all names of something that is no known ViT begin with, of the usual wrappers."""
    prefix = ""
    while found := [p for p in PREFIXES if all(name.startswith(prefix + p) for name in table)]:
        prefix += found[0]
    return prefix


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper).replace("." + wrapper, ".")
    return name


def _own_names(table: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, str]:
    """The model's own names, each with that in the table: what follows the prefix, and classifiers that lie outside.

    Raises:
        InputError: there is a classifier within the prefix and another outside: nobody can tell which is read.
    """
    names = {name[len(prefix) :]: name for name in table if name.startswith(prefix)}
    within, outer = _classifier(names, table), prefix
    while outer:
        outer = outer[: outer.rstrip(".").rfind(".") + 1]
        beside = {
            name[len(outer) :]: name
            for name in table
            if name.startswith(outer) and name[len(outer) :].startswith(HEADS) and not name.startswith(prefix)
        }
        if within and (without := _classifier(beside, table)):
            raise InputError(
                f"{path} holds two classifiers, {names[within]} and {beside[without]}; take out of it the one that the "
                "model does not end in"
            )
        if not within:
            names = beside | names
            within = _classifier(names, table)
    return names


def _classifier(names: Mapping[str, str], table: Mapping[str, Tensor]) -> str | None:
    """The first layer of a classifier among the names of a model."""
    ends = ((name, original) for name, original in names.items() if name.startswith(HEADS) and name.endswith(".weight"))
    return next((name for name, original in ends if table[original].ndim == 2), None)


def _rank(key: str) -> int:
    """Which of several models is taken: the lowest."""
    parts = key.lower().split(".")
    if any("ema" in part.split("_") or part == "ema" for part in parts):
        return FIRST
    return TEACHER if "teacher" in parts else STUDENT if any(part in LAST for part in parts) else PLAIN


def _same(first: Mapping[str, Tensor], *others: Mapping[str, Tensor]) -> bool:
    return all(
        first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
        for other in others
    )


def _as_fp32(tensor: Tensor, name: str, path: Path) -> Tensor:
    """A tensor in FP32; whole numbers stay.

    Raises:
        InputError: it holds no plain numbers, or some that are not finite.
    """
    if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
        kind = "on the meta device" if tensor.is_meta else "quantised" if tensor.is_quantized else str(tensor.layout)
        raise InputError(f"{path}: {name} is {kind}; save the weights as dense numbers, such as FP32")
    if not tensor.is_floating_point():
        return tensor
    if not tensor.isfinite().all():
        raise InputError(f"{path}: {name} holds NaN or infinite values; these weights cannot be used")
    return tensor.float()
