"""The MLP of a slim block: two layers with an activation between, or gated ones (SwiGLU, Shazeer, 2020)."""

from torch import Tensor, nn

from lowpass.pipeline.model.architecture import ACTIVATIONS, Activation


class SlimMlp(nn.Module):
    """[B, T, C] -> [B, T, C]. `norm` comes before the second layer, in models that have one there (BEiT-3).

    Gated, a hidden channel is a product: of a row of `fc1`, and of a row of `gate` behind the activation. Both go with
    it.
    """

    def __init__(
        self, dim: int, hidden: int, activation: Activation, gated: bool = False, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden) if gated else None
        self.act: nn.Module = ACTIVATIONS[activation]()
        self.norm: nn.Module = norm or nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)

    @property
    def first(self) -> dict[str, nn.Linear]:
        """The layers that give hidden channels, by name."""
        return {"fc1": self.fc1} if self.gate is None else {"gate": self.gate, "fc1": self.fc1}

    def features(self, x: Tensor) -> Tensor:
        """What the second layer reads [B, T, hidden]."""
        hidden: Tensor = self.act(self.fc1(x)) if self.gate is None else self.act(self.gate(x)) * self.fc1(x)
        normed: Tensor = self.norm(hidden)
        return normed

    def forward(self, x: Tensor) -> Tensor:
        read: Tensor = self.fc2(self.features(x))
        return read
