"""What recovery aims at: the dense model's tokens at the block at hand, for those tokens that are still there."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lowpass.pipeline.base.processes import Share, sums_over_processes
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.method.query_key_recovery import QueryKey, refit_query_key
from lowpass.pipeline.method.recovery import (
    Moments,
    Refit,
    Rows,
    moments,
    refit,
    refit_together,
    token_weights,
    unscaled,
)
from lowpass.pipeline.method.token_scores import kept_indices
from lowpass.pipeline.model.architecture import DenseViT
from lowpass.pipeline.model.slim_block import SlimBlock, layer_scale
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.activation_store import Store

REFIT_ROWS = 131_072  # tokens that recovery looks at: some hundred for each unknown of a row


class RecoveryTargets:
    """Of the block at hand, on the first of the scoring images: on this process's, whose share of the batches is
    `share`; what is summed over them is summed over all processes.

    `entering` is what enters the block of the dense model, `middle` what leaves its attention and `leaving` what leaves
    all of it, each [B, T, C] a batch. `alive` [B, t] says which of the dense model's tokens the pruned one still has,
    found in `precision`, a context, as its own stream is: else near ties would be told otherwise.
    """

    def __init__(
        self,
        dense: Sequence[SlimBlock],
        described: DenseViT,
        entering: list[Tensor],
        share: Share,
        store: Store,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.dense, self.described, self.store, self.device, self.index = dense, described, store, device, 0
        self.precision = precision
        self.entering, self.share = entering, share
        self.deviates = False  # whether what enters the pruned model's block is not what enters the dense one's
        self.alive = [torch.arange(tokens.shape[1]).expand(len(tokens), -1) for tokens in entering]
        self._run_dense()

    @property
    def any(self) -> bool:
        """Whether anything is refitted. This process may have none of the images that are looked at."""
        return bool(self.dense and self.share.lengths)

    @property
    def batches(self) -> int:
        """How many of this process's scoring batches are looked at."""
        return len(self.entering)

    def _run_dense(self) -> None:
        self.middle, self.leaving = list[Tensor](), list[Tensor]()
        for tokens in self.entering if self.index < len(self.dense) else ():
            block = self.dense[self.index]
            with torch.no_grad():
                middle, _ = block.mix(tokens.to(self.device))
                self.middle.append(self.store(middle))
                self.leaving.append(self.store(block.feed(middle)))

    def ascend(self, block: SlimBlock, clean: Sequence[Tensor]) -> None:
        """Move past the block at hand, which the pruned model has as `block`; `clean` is what enters that."""
        for i, alive in enumerate(self.alive):
            with self.precision():
                self.alive[i] = self._selected(block, clean[i].to(self.device), alive.to(self.device))[1].cpu()
        if self.dense:
            self.deviates |= block.shape != self.dense[self.index].shape
        self.entering = self.leaving
        self.index += 1
        self._run_dense()

    def refit_attention_inputs(self, block: SlimBlock, clean: Sequence[Tensor]) -> tuple[Refit, ...]:
        """Refit query, key and value of an uncut block, in place: from what enters the pruned model's block they are to
        give what the dense model's give."""
        layers = [block.attn.query, block.attn.key, block.attn.value]
        if not self.deviates or any(layer.bias is None for layer in layers):
            return ()
        return (refit_together(layers, "query/key/value", *self._moments(self._attention_input_rows(block, clean))),)

    def refit(
        self, block: SlimBlock, before: SlimBlock, choice: ChannelChoice | None, clean: Sequence[Tensor]
    ) -> tuple[Refit, ...]:
        """Refit what reads removed channels in `block`, as far as it has attention and an MLP, and what reads a stream
        that is no longer the dense model's, in place.

        Args:
            block: pruned.
            before: the block as it was.
            choice: what stayed of it; None: everything.
            clean: what enters `block`.
        """
        if choice is None and not self.deviates:
            return ()  # the dense model's block, which reads the dense model's stream
        done = []
        if block.has_attention:
            # Thinned heads of rotary positions are left as they are: their logits depend on where tokens are as well.
            if choice is not None and block.attn.qk_dim < before.attn.qk_dim and not block.attn.rotary:
                inputs = (block.normed(tokens) for tokens in self._visiting(clean))
                kept = choice.heads
                done.append(refit_query_key(query_key_of(block), inputs, query_key_of(before), kept, self._moments))
            rows = self._attention_rows(block, clean)
            done.append(refit(block.attn.proj, "attn.proj", *self._moments(rows), layer_scale(block.ls1)))
        if not block.has_mlp:
            return tuple(done)
        reads_other = self.deviates or not block.has_attention
        if reads_other or block.attn.value.out_features < before.attn.value.out_features:
            hidden = range(before.shape.hidden) if choice is None else choice.hidden
            rows = self._mlp_input_rows(block, clean, list(hidden))
            first = block.mlp.first
            done.append(refit_together(list(first.values()), f"mlp.{'/'.join(first)}", *self._moments(rows)))
        done.append(
            refit(block.mlp.fc2, "mlp.fc2", *self._moments(self._mlp_rows(block, clean)), layer_scale(block.ls2))
        )
        return tuple(done)

    def refit_classifier(self, model: SlimViT, clean: Sequence[Tensor]) -> tuple[Refit, ...]:
        """Refit the classifiers of a pruned model, in place, by the dense model's logits; `clean` is what leaves its
        last block."""
        done = []
        for name, layer in model.classifiers.items():
            seen = list[Tensor]()
            hook = layer.register_forward_hook(lambda _, inputs, output, seen=seen: seen.extend((*inputs, output)))
            rows = list[Rows]()
            for dense, slim in zip(self._visiting(self.entering), self._visiting(clean), strict=True):
                for tokens in (dense, slim):
                    model.classify(tokens)
                _, wanted, features, _ = seen
                seen.clear()
                rows.append((features[:, None], wanted[:, None], torch.ones(1, device=self.device)))
            hook.remove()
            done.append(refit(layer, name, *self._moments(rows)))
        return tuple(done)

    def moments_of(
        self, block: SlimBlock, clean: Sequence[Tensor]
    ) -> tuple[tuple[Moments, Moments], tuple[Moments, Moments]]:
        """Of what the projection and the second MLP layer read in an uncut block, of which any cut is a part."""
        return self._moments(self._attention_rows(block, clean)), self._moments(self._mlp_rows(block, clean))

    def _moments(self, rows: Iterable[Rows]) -> tuple[Moments, Moments]:
        return moments(rows, self.share.starts, sums_over_processes)

    def _visiting(self, clean: Sequence[Tensor]) -> Iterator[Tensor]:
        for tokens in clean[: self.batches]:
            yield tokens.to(self.device)

    def _attention_input_rows(self, block: SlimBlock, clean: Sequence[Tensor]) -> Iterator[Rows]:
        """What query, key and value read, and what they should give, side by side."""
        dense = self.dense[self.index]
        layers = (dense.attn.query, dense.attn.key, dense.attn.value)
        for tokens, alive, entering in zip(self._visiting(clean), self.alive, self.entering, strict=True):
            wanted = dense.normed(_pick(entering.to(self.device), alive.to(self.device)))
            target = torch.cat([layer(wanted) for layer in layers], 2)
            yield block.normed(tokens), target, self._weights(block, tokens, last=False)  # attention reads all tokens

    def _mlp_input_rows(self, block: SlimBlock, clean: Sequence[Tensor], hidden: list[int]) -> Iterator[Rows]:
        """What the MLP's first layers read, and what they should give, side by side; they have the dense ones' channels
        `hidden`."""
        dense = self.dense[self.index]
        for tokens, alive, middle in zip(self._visiting(clean), self.alive, self.middle, strict=True):
            now, left = self._selected(block, tokens, alive.to(self.device))
            wanted = dense.hidden_input(_pick(middle.to(self.device), left))
            target = torch.cat([layer(wanted)[..., hidden] for layer in dense.mlp.first.values()], 2)
            yield block.hidden_input(now), target, self._weights(block, now)

    def _attention_rows(self, block: SlimBlock, clean: Sequence[Tensor]) -> Iterator[Rows]:
        """What the projection reads, and what it should give: in a block without an MLP what the MLP gave, too."""
        goal = self.middle if block.has_mlp else self.leaving
        for tokens, alive, after in zip(self._visiting(clean), self.alive, goal, strict=True):
            features, _ = block.features(tokens)
            wanted = block.stream.tokens(_pick(after.to(self.device), alive.to(self.device)) - tokens)
            target = unscaled(wanted, layer_scale(block.ls1), block.attn.proj, features)
            yield features, target, self._weights(block, tokens)

    def _mlp_rows(self, block: SlimBlock, clean: Sequence[Tensor]) -> Iterator[Rows]:
        """What the second MLP layer reads, and what it should give."""
        for tokens, alive, leaving in zip(self._visiting(clean), self.alive, self.leaving, strict=True):
            middle, left = self._selected(block, tokens, alive.to(self.device))
            hidden = block.mlp.features(block.hidden_input(middle))
            wanted = block.stream.tokens(_pick(leaving.to(self.device), left) - middle)
            target = unscaled(wanted, layer_scale(block.ls2), block.mlp.fc2, hidden)
            yield hidden, target, self._weights(block, middle)

    def _weights(self, block: SlimBlock, tokens: Tensor, last: bool | None = None) -> Tensor:
        """Of tokens that `block` passes on; `last`: to the classifier, None: if it is the last block."""
        last = self.index == len(self.dense) - 1 if last is None else last
        return token_weights(tokens.shape[1], block.num_prefix_tokens, self.described.readout, last, tokens)

    def _selected(self, block: SlimBlock, tokens: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens after attention and selection, and which of the dense model's tokens they are."""
        middle, weights = block.mix(tokens)
        if not block.scores_tokens:
            return middle, alive
        prefix = torch.arange(block.num_prefix_tokens, device=tokens.device).expand(len(tokens), -1)
        kept = kept_indices(block.scores(middle, weights), block.keep) + block.num_prefix_tokens
        index = torch.cat([prefix, kept], 1)
        return _pick(middle, index), alive.gather(1, index)


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, n] of tokens [B, T, C]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def query_key_of(block: SlimBlock) -> QueryKey:
    """The layers whose products are a block's logits."""
    return QueryKey(block.attn.query, block.attn.key, block.attn.num_heads)
