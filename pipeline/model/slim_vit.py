"""The slim ViT: timm's ViT with each block replaced by one whose heads, widths and token count are its own."""

import json
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_bytes, write_json
from lowpass.pipeline.method.energy import EnergyNorm
from lowpass.pipeline.method.token_scores import TokenCriterion, TokenScore
from lowpass.pipeline.model.architecture import Architecture, Preprocessing, read_architecture
from lowpass.pipeline.model.from_timm import describe_dense, split_qkv
from lowpass.pipeline.model.readout import embedding_and_head
from lowpass.pipeline.model.slim_block import SlimBlock

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "slim.safetensors"
DENSE_WEIGHTS_FILE = "dense.safetensors"


class SlimViT(nn.Module):
    """A DeiT with slim blocks: images [B, C, H, W] -> logits [B, classes]. Everything but the blocks is timm's own.

    Example:
        >>> import torch
        >>> from lowpass.pipeline.checkpoints.load import load_model
        >>> slim = SlimViT.from_timm(load_model("digits_deit"))
        >>> slim.set_keep(2, 40)  # block 2 and all above it pass on 40 of the 64 image tokens
        >>> slim(torch.zeros(1, 3, 32, 32)).shape, slim.architecture.blocks[5].keep
        (torch.Size([1, 10]), 40)
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self._description = architecture
        self.vit = embedding_and_head(architecture.dense)
        self.vit.blocks = nn.Sequential(*(SlimBlock(architecture, i) for i in range(architecture.dense.depth)))

    @property
    def blocks(self) -> list[SlimBlock]:
        """The blocks, from the bottom."""
        return cast(list[SlimBlock], list(self.vit.blocks))

    @property
    def architecture(self) -> Architecture:
        """The architecture as it stands now."""
        return self._description.model_copy(update={"blocks": tuple(block.shape for block in self.blocks)})

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.vit(images))

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> the tokens [B, P + N, C] that enter the first block."""
        return cast(Tensor, self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images))))

    def summary(self, tokens: Tensor) -> Tensor:
        """What stands for the image in tokens [B, P + N, C] between blocks, [B, C]: CLS, or the mean of the image
        tokens where that is read in its place. It is T of LFS (eq. 4)."""
        dense = self._description.dense
        return tokens[:, dense.num_prefix_tokens :].mean(1) if dense.mean_readout else tokens[:, 0]

    def classify(self, tokens: Tensor) -> Tensor:
        """Tokens as they leave the last block -> logits [B, classes]."""
        return cast(Tensor, self.vit.forward_head(self.vit.norm(tokens)))

    @property
    def classifiers(self) -> dict[str, nn.Linear]:
        """The layers that give logits, by name: one, or two where the distillation token has its own."""
        names = ("head", "head_dist") if self._description.dense.distilled else ("head",)
        return {name: cast(nn.Linear, getattr(self.vit, name)) for name in names}

    def set_keep(self, block: int, keep: int) -> None:
        """Let `block` pass on `keep` image tokens; later blocks that kept more pass on as many as now reach them."""
        tokens = self.blocks[block].tokens_in
        for index, later in enumerate(self.blocks[block:], block):
            later.set_tokens(tokens, keep if index == block else min(later.keep, tokens))
            tokens = later.keep

    @classmethod
    def from_timm(
        cls,
        model: nn.Module,
        token_cutoff: float = 0.85,
        energy_norm: EnergyNorm = "l2",
        token_score: TokenScore = "full",
        token_criterion: TokenCriterion = "lfe-attention",
        token_seed: int = 0,
    ) -> "SlimViT":
        """A slim ViT with nothing removed: the dense model's weights, its logits to 1e-5.

        Raises:
            InputError: `model` is not a plain ViT; the message says what is in the way.
        """
        dense = describe_dense(model)
        scale = cast(Any, model).blocks[0].attn.scale
        config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
        architecture = Architecture(
            dense=dense,
            preprocessing=Preprocessing(
                mean=config.get("mean", (0.5,) * dense.in_chans),
                std=config.get("std", (0.5,) * dense.in_chans),
                crop_pct=config.get("crop_pct") or 1.0,
                interpolation=config.get("interpolation", "bicubic"),
                crop_mode=config.get("crop_mode") or "center",
                source=config.get("preprocessing_source", ""),
            ),
            qk_scale=scale,
            token_cutoff=token_cutoff,
            energy_norm=energy_norm,
            # Without CLS there is no CLS row: what image tokens receive takes the whole matrix.
            token_score="full" if dense.mean_readout else token_score,
            token_criterion=token_criterion,
            token_seed=token_seed,
            blocks=dense.blocks(),
        )
        slim = cls(architecture)
        slim.vit.load_state_dict(split_qkv(model.state_dict()))
        parameter = next(model.parameters())
        return slim.to(parameter.device, parameter.dtype).train(model.training)

    def save(self, directory: Path | str, weights_file: str = WEIGHTS_FILE) -> None:
        """Write the weights, then `architecture.json`, each whole or not at all. A dense model kept for comparison
        goes to `dense.safetensors` alone: its table follows from the slim one's."""
        directory = Path(directory)
        write_bytes(directory / weights_file, self.serialised())
        if weights_file == WEIGHTS_FILE:
            write_json(directory / ARCHITECTURE_FILE, json.loads(self.architecture.model_dump_json()))

    def serialised(self) -> bytes:
        """The weights as safetensors; the same weights give the same bytes."""
        state = {name: tensor.cpu().contiguous() for name, tensor in self.vit.state_dict().items()}
        return save(state, {"format": "pt"})

    @classmethod
    def load(cls, directory: Path | str, weights_file: str = WEIGHTS_FILE) -> "SlimViT":
        """The slim model of a run directory, or with `dense.safetensors` its dense one; on the CPU, in evaluation mode.

        Raises:
            InputError: a file is missing, damaged, or does not fit the other.
        """
        directory = Path(directory)
        architecture = read_architecture(directory / ARCHITECTURE_FILE)
        if weights_file == DENSE_WEIGHTS_FILE:
            architecture = architecture.model_copy(update={"blocks": architecture.dense.blocks()})
        slim = cls(architecture)
        path = directory / weights_file
        try:
            slim.vit.load_state_dict(load(path.read_bytes()))
        except OSError as error:
            hint = "; was the run imported without --dense?" if weights_file == DENSE_WEIGHTS_FILE else ""
            raise InputError(f"cannot read {path}: {error.strerror}{hint}") from None
        except (SafetensorError, RuntimeError) as error:
            first = str(error).strip().splitlines()
            raise InputError(f"{path} does not hold the weights of its architecture: {' '.join(first[:2])}") from None
        return slim.eval()
