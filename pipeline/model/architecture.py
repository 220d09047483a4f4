"""The architecture of a slim ViT: one table of five numbers per block, beside the dense model it came from."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from timm.layers import GELUTanh, QuickGELU
from torch import nn

from lowpass.pipeline.base.errors import InputError, first_problem
from lowpass.pipeline.method.block_shape import BlockShape, Positive
from lowpass.pipeline.method.recovery import Readout
from lowpass.pipeline.method.rotary import Rotary
from lowpass.pipeline.method.token_choices import READING_ENERGY, EnergyNorm, TokenCriterion, TokenScore


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
}
# What the classifier reads, in timm's terms: CLS, the mean of the image tokens, or what a learned query gathers from
# tokens; and, not in timm, CLS beside that mean, as the linear heads of DINOv2 do.
GlobalPool = Literal["token", "avg", "map", "token+avg"]


class DenseViT(_Frozen):
    """What timm needs to rebuild the parts that are never pruned (embedding, prefix tokens, norms around the blocks,
    head), and which kind of block lies between.

    `pre_norm`: a norm before the blocks (CLIP). `final_norm`: one behind them; `fc_norm`: that one comes after pooling.
    `attn_norm`, `mlp_norm`: one before each block's projection and second MLP layer (BEiT-3). `gated`: what that layer
    reads is the product of two layers, one of them behind the activation (SwiGLU). `differential`: attention
    is the difference of two softmaxes (Ye et al., 2024), whose heads go whole or not at all. `rotary`: angles by which
    each block turns queries and keys (None: it does not), whose channels go by pairs. `learned_positions`: a table of
    them is added to the tokens.
    """

    name: str
    img_size: tuple[Positive, Positive]
    patch_size: tuple[Positive, Positive]
    in_chans: Positive
    num_classes: Positive
    embed_dim: Positive
    num_heads: Positive
    hidden: Positive
    depth: Positive
    norm_eps: float
    distilled: bool = False
    reg_tokens: int = 0
    no_embed_class: bool = False
    layer_scale: bool = False
    qkv_bias: bool = True
    head_dim: Positive | None = None  # None: embed_dim / num_heads
    class_token: bool = True
    global_pool: GlobalPool = "token"
    pool_prefix: bool = False  # whether a pool over tokens takes in the prefix tokens
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool = False
    activation: Activation = "gelu"
    attn_norm: bool = False
    mlp_norm: bool = False
    gated: bool = False
    differential: bool = False
    rotary: Rotary | None = None
    learned_positions: bool = True

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image's tokens."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_tokens(self) -> int:
        """Image tokens that enter the first block."""
        return self.grid[0] * self.grid[1]

    @property
    def qk_step(self) -> int:
        """How many query and key channels of a head go together: two where positions are rotary."""
        return 1 if self.rotary is None else 2

    @property
    def num_prefix_tokens(self) -> int:
        """CLS, distillation and register tokens."""
        return self.class_token + self.distilled + self.reg_tokens

    @property
    def reads_image_tokens(self) -> bool:
        """Whether the classifier reads image tokens; otherwise it reads prefix tokens alone."""
        return self.global_pool != "token"

    @property
    def mean_readout(self) -> bool:
        """Whether the mean of the image tokens stands for the image, in scores of tokens and channels; otherwise CLS
        does."""
        return self.global_pool in ("avg", "map")

    @property
    def readout(self) -> Readout:
        """What the classifier reads: register tokens only where a pool takes in all prefix tokens."""
        pooled = self.num_prefix_tokens if self.pool_prefix else 0
        prefix = pooled if self.mean_readout else self.class_token + self.distilled
        return Readout(prefix, self.reads_image_tokens, not self.mean_readout)

    def end_macs(self) -> int:
        """MACs of the patch embedding, the pool (of all tokens, were none dropped) and the classifiers."""
        patch = self.patch_size[0] * self.patch_size[1] * self.in_chans
        read = 2 if self.distilled or self.global_pool == "token+avg" else 1
        ends = self.num_tokens * patch * self.embed_dim + self.embed_dim * self.num_classes * read
        if self.global_pool == "map":
            tokens = self.num_tokens + self.num_prefix_tokens * self.pool_prefix
            ends += 2 * self.embed_dim * (tokens * (self.embed_dim + 1) + self.embed_dim + self.hidden)
        return ends

    def attention_macs(self, tokens: int, shape: BlockShape) -> int:
        """MACs of query, key, value, their products and the projection over `tokens`, prefix tokens included."""
        return tokens * (2 * self.embed_dim + tokens) * shape.heads * (shape.qk_dim + shape.v_dim)

    def mlp_macs(self, tokens: int, hidden: int) -> int:
        """MACs of the MLP's two layers, or three where it is gated, over `tokens`, prefix tokens included."""
        return tokens * self.embed_dim * (3 if self.gated else 2) * hidden

    def blocks(self) -> tuple[BlockShape, ...]:
        """The table of the dense model itself."""
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        shape = BlockShape(
            heads=self.num_heads, qk_dim=head_dim, v_dim=head_dim, hidden=self.hidden, keep=self.num_tokens
        )
        return (shape,) * self.depth


class Preprocessing(_Frozen):
    """How an image becomes the model's input, in timm's terms."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    crop_mode: Literal["center", "squash", "border"] = "center"  # `squash` does not keep the picture's proportions
    source: str = ""  # where these come from


class Architecture(_Frozen):
    """A slim model without its weights. `qk_scale` stays the dense model's, however thin a head becomes."""

    dense: DenseViT
    preprocessing: Preprocessing
    qk_scale: float
    token_cutoff: Annotated[float, Field(gt=0, lt=1)] = 0.85
    energy_norm: EnergyNorm = "l2"
    token_score: TokenScore = "full"
    token_criterion: TokenCriterion = "lfe-attention"
    token_seed: int = 0  # of tokens that are drawn
    blocks: tuple[BlockShape, ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_blocks(self.blocks, self.dense)
        return self

    def tokens_in(self, block: int) -> int:
        """Image tokens that enter a block."""
        return self.dense.num_tokens if block == 0 else self.blocks[block - 1].keep

    def macs(self) -> int:
        """Multiply-accumulates of one image: every matrix product and the patch convolution, the token filter too."""
        dense, sum_ = self.dense, self.dense.end_macs()
        for index, block in enumerate(self.blocks):
            image_tokens = self.tokens_in(index)
            sum_ += dense.attention_macs(image_tokens + dense.num_prefix_tokens, block)
            sum_ += dense.mlp_macs(block.keep + dense.num_prefix_tokens, block.hidden)
            if block.keep < image_tokens:
                sum_ += self.selection_macs(image_tokens)
        return sum_

    def selection_macs(self, image_tokens: int) -> int:
        """MACs of scoring that many image tokens: LFE's low-pass as a matrix, where LFE is read at all."""
        return image_tokens * image_tokens * self.dense.embed_dim if self.token_criterion in READING_ENERGY else 0

    @property
    def last_attention(self) -> int:
        """The last block with attention: what leaves it is read by token, and a classifier that reads prefix tokens
        alone needs no others from there on. 0 where no block has attention."""
        return max((index for index, block in enumerate(self.blocks) if block.heads), default=0)

    def with_keep(self, block: int, keep: int) -> "Architecture":
        """With `block` passing on `keep` image tokens, and later blocks at most as many."""
        shapes, tokens = list(self.blocks[:block]), keep
        for index, shape in enumerate(self.blocks[block:], block):
            # Without attention a block passes on whatever enters it.
            tokens = tokens if index == block or not shape.heads else min(shape.keep, tokens)
            shapes.append(shape.model_copy(update={"keep": tokens}))
        return self.model_copy(update={"blocks": tuple(shapes)})

    def with_block(self, block: int, shape: BlockShape) -> "Architecture":
        """With one block's shape replaced."""
        return self.model_copy(update={"blocks": (*self.blocks[:block], shape, *self.blocks[block + 1 :])})


def check_blocks(blocks: tuple[BlockShape, ...], dense: DenseViT) -> None:
    """Refuse a table that cannot be cut out of `dense`.

    Raises:
        InputError: naming the block, the field, its value and the limit.
    """
    if len(blocks) != dense.depth:
        raise InputError(f"{dense.name} has {dense.depth} blocks, the architecture {len(blocks)}")
    limits, tokens = dense.blocks()[0], dense.num_tokens
    for index, block in enumerate(blocks):
        for field in ("heads", "qk_dim", "v_dim", "hidden"):
            value, limit = getattr(block, field), getattr(limits, field)
            if value > limit:
                raise InputError(f"block {index}: {field} is {value}, but {dense.name} has only {limit}")
        if block.keep > tokens:
            raise InputError(f"block {index}: keep is {block.keep}, but only {tokens} image tokens enter it")
        if block.keep < tokens and not block.heads:
            raise InputError(
                f"block {index}: keep is {block.keep}, but {tokens} image tokens enter it, and without attention "
                "(heads is 0) a block passes on all of them"
            )
        if dense.differential and block.heads and (block.qk_dim, block.v_dim) != (limits.qk_dim, limits.v_dim):
            raise InputError(f"block {index}: {dense.name} has differential attention, whose heads cannot be thinned")
        if block.qk_dim % dense.qk_step:
            raise InputError(
                f"block {index}: qk_dim is {block.qk_dim}, but {dense.name} has rotary positions, which turn channels "
                "by pairs"
            )
        tokens = block.keep


class _Table(BaseModel):
    blocks: tuple[BlockShape, ...]


def read_blocks(path: Path) -> tuple[BlockShape, ...]:
    """The table from an `architecture.json` or any JSON object with a `blocks` list.

    Raises:
        InputError: the file is missing or malformed; the message names the file and the field.
    """
    try:
        return _Table.model_validate_json(path.read_bytes()).blocks
    except OSError as error:
        raise InputError(f"cannot read the architecture {path}: {error.strerror}") from None
    except ValidationError as error:
        raise InputError(f"{path} is not an architecture: {first_problem(error)}") from None


def read_architecture(path: Path) -> Architecture:
    """A whole `architecture.json`.

    Raises:
        InputError: the file is missing or malformed.
    """
    try:
        return Architecture.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; is {path.parent} a run directory?") from None
    except ValidationError as error:
        raise InputError(f"{path} is not an architecture: {first_problem(error)}") from None
