"""Indirect object identification with one template, as `ioi` otherwise."""

from __future__ import annotations

import random

from edgeprune.prompts.tasks import ioi


def sample(rng: random.Random) -> dict:
    """One example of the first template."""
    return ioi.sample(rng, ioi.TEMPLATES[:1])
