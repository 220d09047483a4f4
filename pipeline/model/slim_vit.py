"""The slim ViT: timm's ViT with each block replaced by one whose heads, widths and token count are its own."""

import json
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_bytes, write_json, write_text
from lowpass.pipeline.method.token_choices import EnergyNorm, TokenCriterion, TokenScore
from lowpass.pipeline.model.architecture import Architecture, Preprocessing, read_architecture
from lowpass.pipeline.model.card import CARD_FILE, CardFacts, model_card
from lowpass.pipeline.model.classes import CLASSES_FILE, has_classes, load_classes, save_classes
from lowpass.pipeline.model.from_timm import describe_dense, slim_state
from lowpass.pipeline.model.hub import download
from lowpass.pipeline.model.readout import embedding_and_head
from lowpass.pipeline.model.slim_block import SlimBlock, stream_of
from lowpass.pipeline.model.stream import Stream

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "slim.safetensors"
DENSE_WEIGHTS_FILE = "dense.safetensors"
CONFIG_FILE = "config.json"  # of Transformers' and timm's folders


class SlimViT(nn.Module, ModelHubMixin):
    """A DeiT with slim blocks: images [B, C, H, W] -> logits [B, classes]. Everything but the blocks is timm's own.

    `push_to_hub(repo_id)` is huggingface_hub's. `classes` (in the order of the logits) and `card_facts` are for it and
    for `save_pretrained`; they play no part in the arithmetic.

    Example:
        >>> import torch
        >>> from lowpass.pipeline.checkpoints.load import load_model
        >>> slim = SlimViT.from_timm(load_model("digits_deit"))
        >>> slim.set_keep(2, 40)  # block 2 and all above it pass on 40 of the 64 image tokens
        >>> slim(torch.zeros(1, 3, 32, 32)).shape, slim.architecture.blocks[5].keep
        (torch.Size([1, 10]), 40)
    """

    classes: tuple[str, ...] | None = None
    card_facts: CardFacts = CardFacts()

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self._description = architecture
        self.stream: Stream = stream_of(architecture.dense)  # deployment has another
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
        if self._description.dense.rotary is None:
            return cast(Tensor, self.vit(images))
        return self.classify(self.vit.blocks(self.embed(images)))  # timm's own pass knows of no places

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> the tokens [B, P + N, C] that enter the first block, with their places where positions
        are rotary (see `stream.py`)."""
        tokens = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))
        return cast(Tensor, self.stream.begin(tokens))

    def summary(self, tokens: Tensor) -> Tensor:
        """What stands for the image in tokens [B, P + N, C] between blocks, [B, C]: CLS, or the mean of the image
        tokens where that is read in its place. It is T of LFS (eq. 4)."""
        dense, tokens = self._description.dense, self.stream.tokens(tokens)
        return tokens[:, dense.num_prefix_tokens :].mean(1) if dense.mean_readout else tokens[:, 0]

    def classify(self, tokens: Tensor) -> Tensor:
        """Tokens as they leave the last block -> logits [B, classes]."""
        return cast(Tensor, self.vit.forward_head(self.vit.norm(self.stream.tokens(tokens))))

    @property
    def classifiers(self) -> dict[str, nn.Linear]:
        """The layers that give logits, by name: one, or two where the distillation token has its own."""
        names = ("head", "head_dist") if self._description.dense.distilled else ("head",)
        return {name: cast(nn.Linear, getattr(self.vit, name)) for name in names}

    def set_keep(self, block: int, keep: int) -> None:
        """Let `block` pass on `keep` image tokens; later blocks that kept more pass on as many as now reach them, and
        so do those without attention.

        Raises:
            ValueError: `block` has no attention, and more tokens enter it.
        """
        tokens = self.blocks[block].tokens_in
        for index, later in enumerate(self.blocks[block:], block):
            most = min(later.keep, tokens) if later.has_attention else tokens
            later.set_tokens(tokens, keep if index == block else most)
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
        slim.vit.load_state_dict(slim_state(model))
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

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> str | None:
        """Write the files of `save`, `classes.json` where classes have names, and the model card, each whole or not at
        all. A `README.md` that is there is left as it is.

        Args:
            save_directory: made if missing.
            options: of huggingface_hub's mixin, such as `push_to_hub=True` with `repo_id`.

        Raises:
            InputError: the folder holds another library's model.
        """
        if (Path(save_directory) / CONFIG_FILE).exists():  # which the mixin would remove
            raise InputError(f"{save_directory} holds another model ({CONFIG_FILE}); give another folder")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)
        if self.classes is not None:
            save_classes(save_directory, self.classes)
        if not (save_directory / CARD_FILE).exists():
            write_text(save_directory / CARD_FILE, model_card(self.architecture, self.classes, self.card_facts))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Path | str, **options: Any) -> "SlimViT":
        """The slim model of a folder, a run's as well, or of the hub; on the CPU, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the hub such as `someone/some-model`, with or without
                `hf-hub:` before it, which is downloaded once.
            options: of `huggingface_hub.snapshot_download`, such as `revision`, `token`, `cache_dir`, `force_download`
                and `local_files_only`.

        Raises:
            InputError: there is no such folder or name, or its files are missing, damaged or do not fit.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            if isinstance(pretrained_model_name_or_path, Path):
                raise InputError(f"there is no folder {folder}")
            folder = download(pretrained_model_name_or_path, [ARCHITECTURE_FILE, WEIGHTS_FILE, CLASSES_FILE], **options)
            if not (folder / ARCHITECTURE_FILE).exists():
                raise InputError(f"{pretrained_model_name_or_path} holds no slim model: it has no {ARCHITECTURE_FILE}")
        slim = cls.load(folder)
        if has_classes(folder):
            slim.classes = load_classes(folder, slim.architecture.dense.num_classes)
        return slim
