"""The model as it stands in a search, and what enters the block at hand: the blocks below are final, so what leaves
them is kept and only the rest is run."""

import copy
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.method.energy import kept_indices
from lowpass.pipeline.method.frequency import lowpass_images
from lowpass.pipeline.method.recovery import (
    Moments,
    Refit,
    Rows,
    moments,
    refit,
    refit_pairing,
    token_weights,
    unscaled,
)
from lowpass.pipeline.method.sensitivity import CHANNEL_CRITERIA, ChannelScores, Stream
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim import SlimBlock, SlimViT
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.search.activations import holder

REFIT_ROWS = 131_072  # tokens that recovery looks at: some hundred for each unknown of a row
DEFAULT_BUDGET_GIB = 8.0


class Standing:
    """Blocks below `index` are final. All activations are on the CPU, and visit the model's device a batch at a time.

    `measured` enters the block from the images that measure top-1, those that the dense model is least sure of first,
    so that a trial that fails does so early. `clean` and `low` come from the scoring images and their low-pass (LFS).
    `dense_in` is what enters the same block of the dense model from the first of the scoring images, `alive` [B, P + n]
    which of its tokens are still there: what recovery aims at.
    """

    def __init__(
        self,
        model: SlimViT,
        scoring: Batches,
        measuring: Batches,
        recipe: Recipe,
        directory: Path,
        budget_gib: float = DEFAULT_BUDGET_GIB,
    ) -> None:
        self.model, self.recipe, self.index = model, recipe, 0
        self._cuts = dict[ChannelChoice, tuple[SlimBlock, tuple[Refit, ...]]]()
        self.device = next(model.parameters()).device
        self.labels = [labels for _, labels in scoring]
        tokens = model.architecture.dense.num_tokens + model.architecture.dense.num_prefix_tokens
        refitted = math.ceil(REFIT_ROWS / tokens) if recipe.recovery else 0
        images = sum(len(labels) for _, labels in measuring) + 2 * sum(map(len, self.labels)) + 3 * refitted
        width = model.architecture.dense.embed_dim
        self.hold = holder(images * tokens * width * 4, round(budget_gib * 2**30), directory)
        with torch.no_grad():
            self.clean = [self._embedded(images) for images, _ in scoring]
            self.low = [self._embedded(lowpass_images(images, recipe.image_cutoff)) for images, _ in scoring]
            ordered = self._least_sure_first(measuring)
            self.measured = [self._embedded(images) for images, _ in ordered]
        self.measured_labels = [labels for _, labels in ordered]
        self.dense_in, self.alive = list[Tensor](), list[Tensor]()
        self.dense = copy.deepcopy(model.blocks) if recipe.recovery else []
        while sum(map(len, self.dense_in)) < refitted and len(self.dense_in) < len(self.clean):
            batch = self.clean[len(self.dense_in)]
            self.dense_in.append(batch)
            self.alive.append(torch.arange(tokens).expand(len(batch), -1))
        self._enter()

    def _embedded(self, images: Tensor) -> Tensor:
        return self.hold(self.model.embed(images.to(self.device)).float())

    def _least_sure_first(self, batches: Batches) -> Batches:
        """The same images in batches of the same size, by what the true class leads the others by."""
        leads = []
        for images, labels in batches:
            logits = self.model(images.to(self.device)).cpu()
            true = logits.gather(1, labels.clamp_min(0)[:, None])
            leads.append(true.squeeze(1) - logits.scatter(1, labels.clamp_min(0)[:, None], -torch.inf).amax(1))
        if not leads:
            return []
        order = torch.cat(leads).argsort(stable=True).tolist()
        every = [image for images, _ in batches for image in images]
        true_classes = torch.cat([labels for _, labels in batches])
        size = max(len(labels) for _, labels in batches)
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        return [(torch.stack([every[i] for i in chunk]), true_classes[chunk]) for chunk in chunks]

    def _enter(self) -> None:
        """The dense model's tokens after the attention of this block, and after all of it."""
        self.dense_middle, self.dense_out = list[Tensor](), list[Tensor]()
        for tokens in self.dense_in if self.index < len(self.dense) else ():
            block = self.dense[self.index]
            with torch.no_grad():
                middle, _ = block.mix(tokens.to(self.device))
                self.dense_middle.append(self.hold(middle))
                self.dense_out.append(self.hold(middle + block.ls2(block.mlp(block.norm2(middle)))))

    @torch.no_grad()
    def ascend(self) -> None:
        """Move past the block at hand, which is final now."""
        block = self.model.blocks[self.index]
        for i, alive in enumerate(self.alive):
            self.alive[i] = self._selected(block, self.clean[i].to(self.device), alive.to(self.device))[1].cpu()
        for stream in (self.clean, self.low, self.measured):
            for i, tokens in enumerate(stream):
                stream[i] = self.hold(self._run([block], tokens))
        self.dense_in = self.dense_out
        self.index += 1
        self._cuts.clear()
        self._enter()

    def _run(self, blocks: list[SlimBlock], tokens: Tensor) -> Tensor:
        with self._precision():
            tokens = tokens.to(self.device)
            for block in blocks:
                tokens = block(tokens)
            return tokens.float()

    def _precision(self) -> torch.autocast:
        """Mixed precision where the recipe asks for it: FP16 on a GPU, BF16 on a CPU."""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16 if kind == "cpu" else torch.float16, self.recipe.mixed_precision)

    @torch.no_grad()
    def logits(self, blocks: list[SlimBlock], tokens: Tensor) -> Tensor:
        """[B, classes] with `blocks` from here to the top."""
        return self.model.classify(self._run(blocks, tokens)).float()

    def top1(self, blocks: list[SlimBlock], floor: float = 0.0) -> float:
        """Top-1 (percent) on the measuring images with `blocks` from here to the top. It stops as soon as `floor` is
        out of reach; what it returns is then the most that top-1 can be, which is below `floor`."""
        total = sum(map(len, self.measured_labels))
        wrong = 0
        for tokens, labels in zip(self.measured, self.measured_labels, strict=True):
            wrong += int((self.logits(blocks, tokens).argmax(-1).cpu() != labels).sum())
            if 100 * (total - wrong) / total < floor:
                break
        return 100 * (total - wrong) / total

    def divergence(self, blocks: list[SlimBlock], batches: list[Tensor], wanted: list[Tensor]) -> float:
        """Mean KL divergence of the dense model's classes `wanted` (log-probabilities) from those with `blocks`."""
        total = 0.0
        for tokens, log_p in zip(batches, wanted, strict=True):
            log_q = self.logits(blocks, tokens).log_softmax(-1).cpu()
            total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
        return total / sum(map(len, batches))

    def streams(self) -> Iterator[Stream]:
        """What enters the block at hand from the scoring images, on the model's device."""
        for clean, low, labels in zip(self.clean, self.low, self.labels, strict=True):
            yield clean.to(self.device), low.to(self.device), labels.to(self.device)

    def sensitivity(self) -> ChannelScores:
        """Of the block at hand, by the recipe's criterion."""
        return self.scores_of(self.model, self.streams(), self.index)

    def scores_of(self, model: SlimViT, streams: Iterable[Stream], index: int) -> ChannelScores:
        """Of any block of any model, by the recipe's criterion."""
        score = CHANNEL_CRITERIA[self.recipe.channel_criterion]
        return score(model, streams, index, self.recipe.lfs_weight, self.recipe.seed)

    def cut(self, choice: ChannelChoice) -> tuple[SlimBlock, tuple[Refit, ...]]:
        """A copy of the block at hand with the chosen channels alone, refitted; the model stays as it is. The same
        choice gives the same block: what was tried is there when it is accepted."""
        if choice not in self._cuts:
            self._cuts[choice] = self._cut(choice)
        return self._cuts[choice]

    def _cut(self, choice: ChannelChoice) -> tuple[SlimBlock, tuple[Refit, ...]]:
        block = copy.deepcopy(self.model.blocks[self.index])
        before = block.attn.qk_dim
        remove_channels(block, choice)
        if not self.dense_in:
            return block, ()
        with torch.no_grad():
            done = []
            if block.attn.qk_dim < before:
                inputs = (block.norm1(tokens) for tokens in self._inputs())
                done.append(refit_pairing(block, inputs, self.model.blocks[self.index], choice.heads))
            done.append(refit(block.attn.proj, "attn.proj", *moments(self.attention_rows(block))))
            done.append(refit(block.mlp.fc2, "mlp.fc2", *moments(self.mlp_rows(block))))
        return block, tuple(done)

    def _inputs(self) -> Iterator[Tensor]:
        for tokens in self.clean[: len(self.dense_in)]:
            yield tokens.to(self.device)

    def attention_rows(self, block: SlimBlock) -> Iterator[Rows]:
        """What the projection reads, and what it should give."""
        for tokens, alive, middle in zip(self._inputs(), self.alive, self.dense_middle, strict=True):
            features, _ = block.attn.features(block.norm1(tokens), block.reads_attention)
            wanted = _pick(middle.to(self.device), alive.to(self.device)) - tokens
            yield features, unscaled(wanted, block.ls1, block.attn.proj, features), self._weights(tokens)

    def mlp_rows(self, block: SlimBlock) -> Iterator[Rows]:
        """What the second MLP layer reads, and what it should give."""
        for tokens, alive, out in zip(self._inputs(), self.alive, self.dense_out, strict=True):
            middle, left = self._selected(block, tokens, alive.to(self.device))
            hidden = block.mlp.act(block.mlp.fc1(block.norm2(middle)))
            wanted = _pick(out.to(self.device), left) - middle
            yield hidden, unscaled(wanted, block.ls2, block.mlp.fc2, hidden), self._weights(middle)

    def _weights(self, tokens: Tensor) -> Tensor:
        last = self.index == len(self.model.blocks) - 1
        return token_weights(tokens.shape[1], self.model.architecture.dense.num_prefix_tokens, last, tokens)

    def _selected(self, block: SlimBlock, tokens: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens after attention and selection, and which of the dense model's tokens they are."""
        middle, weights = block.mix(tokens)
        if not block.scores_tokens:
            return middle, alive
        prefix = torch.arange(block.num_prefix_tokens, device=tokens.device).expand(len(tokens), -1)
        kept = kept_indices(block.scores(middle, weights), block.keep) + block.num_prefix_tokens
        index = torch.cat([prefix, kept], 1)
        return _pick(middle, index), alive.gather(1, index)

    def refit_moments(self, block: SlimBlock) -> tuple[tuple[Moments, Moments], tuple[Moments, Moments]]:
        """Of what the projection and the second MLP layer read in an uncut block, of which any cut is a part."""
        return moments(self.attention_rows(block)), moments(self.mlp_rows(block))


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, n] of tokens [B, T, C]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
