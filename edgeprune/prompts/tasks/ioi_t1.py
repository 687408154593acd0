"""Indirect object identification with a single template; otherwise the same as `ioi`."""

from __future__ import annotations

import random

from edgeprune.prompts.tasks import ioi


def sample(rng: random.Random) -> dict:
    """Draw one example with the first template."""
    return ioi.sample(rng, ioi.TEMPLATES[:1])
