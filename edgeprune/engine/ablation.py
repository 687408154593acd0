"""What a closed edge carries: the corrupted prompt's value, nothing, or a mean."""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.config import AblationConfig, AblationKind
from edgeprune.engine.circuit_model import Activations, CircuitModel
from edgeprune.errors import ConfigError, DataError
from edgeprune.prompts import Batch, Pair


class Ablation:
    """Gives the values of closed edges for each batch.

    Attributes:
        needs_corrupted: whether they come from the corrupted prompts.

    Args:
        model: whose activations are averaged for mean ablation.
        config: which ablation; or by its name: `interchange`, `zero` or `mean`.
        reference_set: the prompts; their clean activations are averaged for mean ablation.
        batch_size: pairs a forward pass, for that.

    Raises:
        ConfigError: an unknown name.
        DataError: interchange ablation, and no corrupted prompt differs from its clean one.
    """

    def __init__(
        self,
        model: CircuitModel,
        config: AblationConfig | str,
        reference_set: Sequence[Pair],
        batch_size: int = 64,
    ) -> None:
        if not isinstance(config, AblationConfig):
            config = AblationConfig(_kind(config))
        self.kind = config.kind
        self.needs_corrupted = config.kind is AblationKind.interchange
        if self.needs_corrupted and all(
            pair.clean_ids == pair.corrupted_ids for pair in reference_set
        ):
            raise DataError(
                f"all {len(reference_set)} corrupted prompts are the same as their clean ones, so "
                "interchange ablation changes nothing; give corrupted prompts with other answers, "
                "or use ablation zero or mean"
            )
        self.means = None
        if config.kind is AblationKind.mean:
            self.means = model.mean_activations(
                reference_set, batch_size, per_position=config.per_position
            )

    @classmethod
    def of(
        cls,
        model: CircuitModel,
        ablation: Ablation | str,
        reference_set: Sequence[Pair],
        batch_size: int = 64,
    ) -> Ablation:
        """An ablation as it is, or one by its name."""
        if isinstance(ablation, Ablation):
            return ablation
        return cls(model, ablation, reference_set, batch_size)

    def values(self, batch: Batch, corrupted: Activations | None) -> Activations | None:
        """Values of closed edges; None stands for zeros.

        Args:
            batch: the prompts.
            corrupted: activations on their corrupted prompts, if needed.
        """
        if self.needs_corrupted:
            return corrupted
        return None if self.means is None else self.means.for_batch(batch)


def _kind(name: str) -> AblationKind:
    kinds = AblationKind.__members__
    if name not in list(kinds):
        raise ConfigError(f"unknown ablation {name!r}; choose {', '.join(kinds)}")
    return kinds[name]
