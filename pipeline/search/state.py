"""Where a search stands: the model as cut so far, and what enters the block at hand. The blocks below are final, so
what leaves them is kept and only the rest is run."""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.processes import (
    Share,
    in_order,
    same_everywhere,
    share,
    sum_over_processes,
    sums_over_processes,
)
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.method.frequency import lowpass_images
from lowpass.pipeline.method.recovery import Moments, Refit
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.method.structured_obs import BlockMetric
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.model.whole_parts import add_below, mean_added, missing_parts, take_out
from lowpass.pipeline.search.activation_store import DEFAULT_BUDGET_GIB, activation_store
from lowpass.pipeline.search.channel_criteria import CHANNEL_CRITERIA, SEE_LOW_PASSED, CriterionContext, ScoringBatch
from lowpass.pipeline.search.error_metric import block_metrics
from lowpass.pipeline.search.recovery_targets import REFIT_ROWS, RecoveryTargets
from lowpass.pipeline.search.settings import SearchSettings


@dataclass(frozen=True)
class Cut:
    """A block with some of its channels, how what reads them was refitted, and the constant [C] that enters it in place
    of a part that is gone and has left nothing in the block that could take it."""

    block: SlimBlock
    refits: tuple[Refit, ...]
    added: Tensor | None = None


class SearchState:
    """Blocks below `index` are final. All activations are on the CPU, and visit the model's device a batch at a time.

    Of several processes each holds its `share` of the batches, and the same model: what is decided hangs on sums over
    all of them.

    `measured` enters the block from the images that measure top-1, those that the dense model is least sure of first,
    so that a trial that fails does so early. `clean` and `low` come from the scoring images and their low-pass (LFS).
    `metrics` are the dense model's, where the criterion reads them and another state has them.
    """

    def __init__(
        self,
        model: SlimViT,
        scoring: Batches,
        measuring: Batches,
        settings: SearchSettings,
        directory: Path,
        budget_gib: float = DEFAULT_BUDGET_GIB,
        metrics: list[BlockMetric] | None = None,
    ) -> None:
        self.model, self.settings, self.index = model, settings, 0
        self._attention_refits = tuple[Refit, ...]()
        self._cuts = dict[ChannelChoice | None, Cut]()
        self.device = next(model.parameters()).device
        self.share = share(len(labels) for _, labels in scoring)
        scoring = self.share.of(scoring)
        self.labels = [labels for _, labels in scoring]
        dense = model.architecture.dense
        tokens = dense.num_tokens + dense.num_prefix_tokens
        refitted = math.ceil(REFIT_ROWS / tokens) if settings.recovery else 0
        streams = 2 if settings.channel_criterion in SEE_LOW_PASSED else 1
        looked_at = self.share.among_first(refitted)
        with torch.no_grad():
            self.measured_share, ordered = self._least_sure_first(measuring)
        self.measured_labels = [labels for _, labels in ordered]
        held = self.measured_labels + streams * self.labels + 3 * self.labels[:looked_at]
        images = sum(map(len, held))
        self.store = activation_store(images * tokens * dense.embed_dim * 4, round(budget_gib * 2**30), directory)
        with torch.no_grad():
            self.clean = [self._embedded(images) for images, _ in scoring]
            lowpassed = scoring if settings.channel_criterion in SEE_LOW_PASSED else []
            self.low = [self._embedded(lowpass_images(images, settings.image_cutoff)) for images, _ in lowpassed]
            self.measured = [self._embedded(images) for images, _ in ordered]
        self.metrics = metrics or list[BlockMetric]()
        if settings.channel_criterion == "obs" and not self.metrics:
            self.metrics = block_metrics(model, self.clean, settings.seed, self.share, sums_over_processes)
        if settings.recovery and dense.rotary is not None and not settings.shaping.whole_heads:
            logger.info("recovery: queries and keys of thinned heads stay as they are, for positions are rotary")
        blocks = copy.deepcopy(model.blocks) if settings.recovery else []
        entering = self.clean[:looked_at]
        self.targets = RecoveryTargets(blocks, dense, entering, self.share, self.store, self.device, self._precision)

    def _embedded(self, images: Tensor) -> Tensor:
        return self.store(self.model.embed(images.to(self.device)).float())

    def _least_sure_first(self, batches: Batches) -> tuple[Share, Batches]:
        """The same images in batches of the same size, by what the true class leads the others by: this process's
        share of them."""
        own = share(len(labels) for _, labels in batches)
        leads = torch.zeros(sum(own.lengths))
        for start, (images, labels) in zip(own.starts, own.of(batches), strict=True):
            logits = self.model(images.to(self.device)).cpu()
            true = logits.gather(1, labels.clamp_min(0)[:, None])
            others = logits.scatter(1, labels.clamp_min(0)[:, None], -torch.inf).amax(1)
            leads[start : start + len(labels)] = true.squeeze(1) - others
        if not batches:
            return own, []
        order = sum_over_processes(leads).argsort(stable=True).tolist()
        every = [image for images, _ in batches for image in images]
        true_classes = torch.cat([labels for _, labels in batches])
        size = max(len(labels) for _, labels in batches)
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        own = share(map(len, chunks))
        return own, [(torch.stack([every[i] for i in chunk]), true_classes[chunk]) for chunk in own.of(chunks)]

    @torch.no_grad()
    def ascend(self) -> None:
        """Move past the block at hand, which is final now.

        Raises:
            RunError: what leaves it is not all finite: every score and fit above would be none; or it is another block
                in another process.
        """
        block = self.model.blocks[self.index]
        same_everywhere(f"block {self.index}", block.state_dict())
        self.targets.ascend(block, self.clean)
        for stream in (self.clean, self.low, self.measured):
            for i, tokens in enumerate(stream):
                leaving = self._run([block], tokens)
                if not bool(leaving.isfinite().all()):
                    raise RunError(
                        f"block {self.index}: what leaves it is not finite; if mixed precision is on, do without it"
                    )
                stream[i] = self.store(leaving)
        self.index += 1
        self._cuts.clear()
        self._attention_refits = ()

    def _run(self, blocks: list[SlimBlock], tokens: Tensor) -> Tensor:
        with self._precision():
            tokens = tokens.to(self.device)
            for block in blocks:
                tokens = block(tokens)
            return tokens.float()

    def _precision(self) -> torch.autocast:
        """Mixed precision where the settings ask for it: FP16 on a GPU, BF16 on a CPU."""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16 if kind == "cpu" else torch.float16, self.settings.mixed_precision)

    @torch.no_grad()
    def logits(self, blocks: list[SlimBlock], tokens: Tensor) -> Tensor:
        """[B, classes] with `blocks` from here to the top."""
        return self.model.classify(self._run(blocks, tokens)).float()

    def top1(self, blocks: list[SlimBlock], floor: float = 0.0, added: Tensor | None = None) -> float:
        """Top-1 (percent) on the measuring images with `blocks` from here to the top, the constant `added` [C] entering
        them. It stops as soon as `floor` is out of reach; what it returns is then the most that top-1 can be, which is
        below `floor`."""
        total, wrong = sum(self.measured_share.lengths), 0
        found = (
            int((self.logits(blocks, self._shifted(tokens, added)).argmax(-1).cpu() != labels).sum())
            for tokens, labels in zip(self.measured, self.measured_labels, strict=True)
        )
        for count in in_order(found, len(self.measured_share.lengths)):
            wrong += count
            if 100 * (total - wrong) / total < floor:
                break
        return 100 * (total - wrong) / total

    def divergence(
        self, blocks: list[SlimBlock], batches: list[Tensor], wanted: list[Tensor], added: Tensor | None = None
    ) -> float:
        """Mean KL divergence of the dense model's classes `wanted` (log-probabilities) from those with `blocks`, which
        `batches` enter and the constant `added` [C]."""
        sums = torch.tensor([0.0, sum(map(len, batches))], dtype=torch.float64)
        for tokens, log_p in zip(batches, wanted, strict=True):
            log_q = self.logits(blocks, self._shifted(tokens, added)).log_softmax(-1).cpu()
            sums[0] += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        divergence, images = sum_over_processes(sums).tolist()
        return float(divergence / images)

    def streams(self) -> Iterator[ScoringBatch]:
        """What enters the block at hand from the scoring images, on the model's device; the images themselves take the
        place of low-passed ones where the criterion does not see those."""
        for clean, low, labels in zip(self.clean, self.low or self.clean, self.labels, strict=True):
            yield clean.to(self.device), low.to(self.device), labels.to(self.device)

    def channel_scores(self) -> ChannelScores:
        """Of the block at hand, by the criterion asked for."""
        return self.scores_of(self.model, self.streams(), self.index)

    def scores_of(self, model: SlimViT, streams: Iterable[ScoringBatch], index: int) -> ChannelScores:
        """Of any block of any model, by the criterion asked for."""
        criterion = self.settings.channel_criterion
        metric = self.metrics[index] if criterion == "obs" else None
        weight, seed = self.settings.lfs_weight, self.settings.seed
        context = CriterionContext(weight, seed, metric, self.share.starts, sums_over_processes)
        return CHANNEL_CRITERIA[criterion](model, streams, index, context)

    @torch.no_grad()
    def refit_attention(self) -> None:
        """Refit the attention of the block at hand, in place, to what enters it now."""
        if self.targets.any:
            self._attention_refits = self.targets.refit_attention_inputs(self.model.blocks[self.index], self.clean)

    def refit_attention_unless_worse(self, top1: float) -> float:
        """`refit_attention`, undone where top-1 falls below `top1`, what it is before. Returns what it is then."""
        attention = self.model.blocks[self.index].attn
        before = copy.deepcopy(attention.state_dict())
        self.refit_attention()
        after = self.top1(self.model.blocks[self.index :]) if self._attention_refits else top1
        if after < top1:
            attention.load_state_dict(before)
            self._attention_refits = ()
        return max(after, top1)

    def cut(self, choice: ChannelChoice | None) -> Cut:
        """The block at hand with the chosen channels alone (None: all), refitted; the model stays. The same choice
        gives the same block: what was tried is there when it is accepted."""
        if choice not in self._cuts:
            self._cuts[choice] = self._cut(choice)
        return self._cuts[choice]

    @torch.no_grad()
    def _cut(self, choice: ChannelChoice | None) -> Cut:
        before = self.model.blocks[self.index]
        block, dense, last = (
            copy.deepcopy(before),
            self.model.architecture.dense,
            self.index == len(self.model.blocks) - 1,
        )
        added: Tensor | None = None
        for part in missing_parts(block, block.shape if choice is None else choice.shape(block.keep)):
            entering = (self._shifted(tokens.to(self.device), added) for tokens in self.clean)
            left = take_out(block, part, mean_added(block, dense, last, part, entering, sums_over_processes))
            if left is not None:
                added = left if added is None else added + left
        if choice is not None:
            remove_channels(block, choice)
        if not self.targets.any:
            return Cut(block, (), added)
        clean = [self._shifted(tokens, added) for tokens in self.clean[: self.targets.batches]]
        attention_refits = self._attention_refits if block.has_attention else ()
        return Cut(block, attention_refits + self.targets.refit(block, before, choice, clean), added)

    def _shifted(self, tokens: Tensor, added: Tensor | None) -> Tensor:
        return tokens if added is None else self.model.stream.add(tokens, added.to(tokens))

    def accept(self, cut: Cut) -> None:
        """Make a cut block the model's.

        A constant that a bias below the block takes is added to what enters it. Where a block below chooses tokens
        between that bias and here, those stay that it has chosen without the constant.
        """
        self.model.vit.blocks[self.index] = cut.block
        if cut.added is None:
            return
        add_below(self.model, self.index, cut.added)
        for stream in (self.clean, self.low, self.measured):
            for i, tokens in enumerate(stream):
                stream[i] = self.store(self._shifted(tokens, cut.added))

    def top1_with(self, cut: Cut, floor: float = 0.0) -> float:
        """`top1` with a cut in place of the block at hand."""
        return self.top1([cut.block, *self.model.blocks[self.index + 1 :]], floor, cut.added)

    @torch.no_grad()
    def refit_classifier(self) -> tuple[Refit, ...]:
        """In place, once all blocks are final."""
        return self.targets.refit_classifier(self.model, self.clean) if self.targets.any else ()

    def refit_moments(self, block: SlimBlock) -> tuple[tuple[Moments, Moments], tuple[Moments, Moments]]:
        """See `RecoveryTargets.moments_of`."""
        return self.targets.moments_of(block, self.clean)


@contextmanager
def keeping(model: SlimViT, index: int, keep: int) -> Iterator[None]:
    """`model` with fewer tokens for a while."""
    before = [block.keep for block in model.blocks]
    model.set_keep(index, keep)
    try:
        yield
    finally:
        for later in range(index, len(before)):
            model.set_keep(later, before[later])
