"""The slim ViT: timm's ViT with each block replaced by one whose heads, widths and token count are its own."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from timm.layers import Attention, LayerScale, Mlp, PatchEmbed
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_bytes, write_json
from lowpass.pipeline.method.energy import (
    TOKEN_CRITERIA,
    EnergyNorm,
    SeenTokens,
    TokenCriterion,
    TokenScore,
    keep_tokens,
)
from lowpass.pipeline.method.frequency import token_lowpass_matrix
from lowpass.pipeline.model.architecture import Architecture, BlockShape, DenseViT, Preprocessing, read_architecture

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "slim.safetensors"
DENSE_WEIGHTS_FILE = "dense.safetensors"


class AttentionWeights(nn.Module):
    """Softmax attention [B, H, T, T] from query and key [B, H, T, qk_dim]. A module of its own, so that the
    dependency graph can be told that query channels pair with key channels and with nothing else."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return ((query * self.scale) @ key.transpose(-2, -1)).softmax(-1)


class SlimAttention(nn.Module):
    """Multi-head attention whose query/key and value heads may differ in size."""

    def __init__(self, dim: int, shape: BlockShape, scale: float, bias: bool) -> None:
        super().__init__()
        self.num_heads = shape.heads
        self.query = nn.Linear(dim, shape.heads * shape.qk_dim, bias=bias)
        self.key = nn.Linear(dim, shape.heads * shape.qk_dim, bias=bias)
        self.value = nn.Linear(dim, shape.heads * shape.v_dim, bias=bias)
        self.weights = AttentionWeights(scale)
        self.proj = nn.Linear(shape.heads * shape.v_dim, dim)

    @property
    def qk_dim(self) -> int:
        """Channels of a query or key head."""
        return self.query.out_features // self.num_heads

    @property
    def v_dim(self) -> int:
        """Channels of a value head."""
        return self.value.out_features // self.num_heads

    def features(self, x: Tensor, score: TokenScore | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] -> what the projection reads [B, T, H * v_dim], and the attention that a token score needs:
        [B, H, T, T] for `full`, the CLS row [B, H, 1, T] for `cls`. Only `full` keeps attention from running fused."""
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed, weights = attend(query, key, value, self.weights, score)
        return mixed.transpose(1, 2).flatten(2), weights

    def forward(self, x: Tensor, score: TokenScore | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] -> [B, T, C], and the attention that a token score needs."""
        features, weights = self.features(x, score)
        return self.proj(features), weights


def attend(
    query: Tensor, key: Tensor, value: Tensor, weights: AttentionWeights, score: TokenScore | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of [B, H, T, D] tensors, and as much of its matrix as the score needs."""
    if score == "full":
        matrix = weights(query, key)
        return matrix @ value, matrix
    mixed = F.scaled_dot_product_attention(query, key, value, scale=weights.scale)
    return mixed, weights(query[:, :, :1], key) if score == "cls" else None


class SlimBlock(nn.Module):
    """Pre-norm block that passes on the `keep` best image tokens, chosen between attention and MLP (eq. 8-9)."""

    lowpass: Tensor
    chance: Tensor

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__()
        self.keep_tokens: Callable[[Tensor, Tensor, int], Tensor] = (
            keep_tokens  # deployment has other lowerings of the same selection
        )
        dense, shape = architecture.dense, architecture.blocks[index]
        dim = dense.embed_dim
        self.num_prefix_tokens = dense.num_prefix_tokens
        self.token_cutoff = architecture.token_cutoff
        self.energy_norm: EnergyNorm = architecture.energy_norm
        self.token_score: TokenScore = architecture.token_score
        self.criterion = TOKEN_CRITERIA[architecture.token_criterion]
        self.token_seed = architecture.token_seed + index
        self.norm1 = nn.LayerNorm(dim, eps=dense.norm_eps)
        self.attn = SlimAttention(dim, shape, architecture.qk_scale, dense.qkv_bias)
        self.ls1 = LayerScale(dim) if dense.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=dense.norm_eps)
        self.mlp = Mlp(dim, shape.hidden)
        self.ls2 = LayerScale(dim) if dense.layer_scale else nn.Identity()
        self.set_tokens(architecture.tokens_in(index), shape.keep)

    def set_tokens(self, tokens_in: int, keep: int) -> None:
        """Fix how many image tokens enter and leave; what scores them follows (empty where all are kept)."""
        self.tokens_in, self.keep = tokens_in, keep
        lowpass = chance = torch.empty(0)
        if self.scores_tokens and self.criterion.reads_energy:
            lowpass = token_lowpass_matrix(tokens_in, self.token_cutoff)
        if self.scores_tokens and self.criterion.draws:
            chance = torch.rand(tokens_in, generator=torch.Generator().manual_seed(self.token_seed))
        like = self.norm1.weight
        self.register_buffer("lowpass", lowpass.to(like.device, like.dtype), persistent=False)
        self.register_buffer("chance", chance.to(like.device), persistent=False)

    @property
    def scores_tokens(self) -> bool:
        """Whether this block drops tokens."""
        return self.keep < self.tokens_in

    @property
    def reads_attention(self) -> TokenScore | None:
        """What of its attention this block scores tokens by; `full` keeps attention from running fused."""
        return self.token_score if self.scores_tokens and self.criterion.reads_attention else None

    @property
    def shape(self) -> BlockShape:
        """The block's five numbers, read off its layers."""
        return BlockShape(
            heads=self.attn.num_heads,
            qk_dim=self.attn.qk_dim,
            v_dim=self.attn.v_dim,
            hidden=cast(nn.Linear, self.mlp.fc1).out_features,
            keep=self.keep,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, P + tokens_in, C] -> [B, P + keep, C]."""
        x, weights = self.mix(x)
        if self.scores_tokens:
            x = self.keep_tokens(x, self.scores(x, weights), self.keep)
        return x + self.ls2(self.mlp(self.norm2(x)))

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attention with its residual, all tokens still there, and the attention that their scores read."""
        mixed, weights = self.attn(self.norm1(x), self.reads_attention)
        return x + self.ls1(mixed), weights

    def scores(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Token scores [B, tokens_in] from the tokens as they leave the attention residual and the attention."""
        prefix = self.num_prefix_tokens
        attention = x.new_empty(0) if weights is None else weights
        return self.criterion.score(
            SeenTokens(x[:, prefix:], attention, prefix, self.lowpass, self.chance, self.energy_norm, self.token_score)
        )


class SlimViT(nn.Module):
    """A DeiT with slim blocks: images [B, C, H, W] -> logits [B, classes]. Everything but the blocks is timm's own."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self._description = architecture
        self.vit = _embedding_and_head(architecture.dense)
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
        return cast(Tensor, self.vit._pos_embed(self.vit.patch_embed(images)))

    def classify(self, tokens: Tensor) -> Tensor:
        """Tokens as they leave the last block -> logits [B, classes]."""
        return cast(Tensor, self.vit.forward_head(self.vit.norm(tokens)))

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
        dense = describe(model)
        config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
        architecture = Architecture(
            dense=dense,
            preprocessing=Preprocessing(
                mean=config.get("mean", (0.5,) * dense.in_chans),
                std=config.get("std", (0.5,) * dense.in_chans),
                crop_pct=config.get("crop_pct") or 1.0,
                interpolation=config.get("interpolation", "bicubic"),
            ),
            qk_scale=(dense.embed_dim // dense.num_heads) ** -0.5,
            token_cutoff=token_cutoff,
            energy_norm=energy_norm,
            token_score=token_score,
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


def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict with each fused `qkv` layer as `query`, `key` and `value`."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        before, fused, after = name.partition("attn.qkv.")
        if fused:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                split[f"{before}attn.{part}.{after}"] = rows
        else:
            split[name] = tensor
    return split


def describe(model: nn.Module) -> DenseViT:
    """What makes up a dense timm ViT.

    Raises:
        InputError: it is not a plain ViT read out through its CLS token, which is all the method is defined for.
    """
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise InputError(
            f"{name} is a {type(model).__name__}, not a plain ViT; use a DeiT or ViT such as deit_small_patch16_224"
        )
    vit = cast(VisionTransformer, model)
    for obstacle, present in _obstacles(vit):
        if present:
            raise InputError(f"{name} is not a plain ViT: {obstacle}; use one such as deit_small_patch16_224")
    block = cast(Block, vit.blocks[0])
    grid = cast(tuple[int, int], vit.patch_embed.grid_size)
    patch = cast(tuple[int, int], vit.patch_embed.patch_size)
    return DenseViT(
        name=name,
        img_size=(grid[0] * patch[0], grid[1] * patch[1]),
        patch_size=patch,
        in_chans=vit.in_chans,
        num_classes=vit.num_classes,
        embed_dim=vit.embed_dim,
        num_heads=block.attn.num_heads,
        hidden=block.mlp.fc1.out_features,
        depth=len(vit.blocks),
        norm_eps=block.norm1.eps,
        distilled=isinstance(vit, VisionTransformerDistilled),
        reg_tokens=vit.num_reg_tokens,
        no_embed_class=vit.no_embed_class,
        layer_scale=isinstance(block.ls1, LayerScale),
        qkv_bias=block.attn.qkv.bias is not None,
    )


def _norms(vit: VisionTransformer) -> list[nn.Module]:
    norms = [getattr(block, name) for block in vit.blocks if type(block) is Block for name in ("norm1", "norm2")]
    return [*norms, cast(nn.Module, vit.norm)]


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None


def _obstacles(vit: VisionTransformer) -> list[tuple[str, bool]]:
    """What a ViT may have that the method or the slim blocks do not cover."""

    def any_block(test: Callable[[Block], bool]) -> bool:
        return any(type(block) is not Block or test(block) for block in vit.blocks)

    def is_identity(module: nn.Module) -> bool:
        return isinstance(module, nn.Identity)

    return [
        ("it has no blocks", len(vit.blocks) == 0),
        ("it has no CLS token", vit.cls_token is None),
        (f"it reads out by {vit.global_pool!r} pooling, not the CLS token", vit.global_pool != "token"),
        ("it has no classifier", not isinstance(vit.head, nn.Linear)),
        ("its position embedding is not a learned table", vit.pos_embed is None or vit.dynamic_img_size),
        ("it normalises before the blocks", not is_identity(vit.norm_pre) or not is_identity(vit.fc_norm)),
        ("its norm is not a LayerNorm", not all(map(_is_layer_norm, _norms(vit)))),
        (
            "its patch embedding is not a convolution over whole patches",
            type(vit.patch_embed) is not PatchEmbed
            or not is_identity(vit.patch_embed.norm)
            or any(
                size % patch for size, patch in zip(vit.patch_embed.img_size, vit.patch_embed.patch_size, strict=True)
            ),
        ),
        (
            "it is distilled and has register tokens, which timm leaves out",
            isinstance(vit, VisionTransformerDistilled) and vit.num_reg_tokens > 0,
        ),
        ("its blocks are not timm's standard Block", any_block(lambda block: False)),
        ("its attention is not timm's standard Attention", any_block(lambda block: type(block.attn) is not Attention)),
        (
            "its attention is normalised or gated",
            any_block(
                lambda block: (
                    type(block.attn) is Attention
                    and (
                        not all(is_identity(m) for m in (block.attn.q_norm, block.attn.k_norm, block.attn.norm))
                        or block.attn.gate is not None
                    )
                )
            ),
        ),
        (
            "its projections have no bias",
            any_block(lambda block: type(block.attn) is Attention and block.attn.proj.bias is None),
        ),
        (
            "its MLP is not two linear layers with GELU between",
            any_block(
                lambda block: (
                    type(block.mlp) is not Mlp
                    or not isinstance(block.mlp.act, nn.GELU)
                    or block.mlp.act.approximate != "none"
                    or not is_identity(block.mlp.norm)
                )
            ),
        ),
    ]


def _embedding_and_head(dense: DenseViT) -> VisionTransformer:
    """timm's ViT without blocks: embedding, prefix tokens, last norm and head."""
    kind = VisionTransformerDistilled if dense.distilled else VisionTransformer
    return kind(
        img_size=dense.img_size,
        patch_size=dense.patch_size,
        in_chans=dense.in_chans,
        num_classes=dense.num_classes,
        embed_dim=dense.embed_dim,
        num_heads=dense.num_heads,
        depth=0,
        reg_tokens=dense.reg_tokens,
        no_embed_class=dense.no_embed_class,
        norm_layer=partial(nn.LayerNorm, eps=dense.norm_eps),
    )
