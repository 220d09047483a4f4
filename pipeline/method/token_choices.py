"""What the token score can be told, by name. What it means is in `token_scores.py` and `energy.py`."""

from typing import Literal

EnergyNorm = Literal["l2", "l1"]
TokenScore = Literal["full", "cls"]
TokenCriterion = Literal["lfe-attention", "attention", "lfe", "random"]
READING_ENERGY: frozenset[TokenCriterion] = frozenset({"lfe-attention", "lfe"})  # which costs MACs
