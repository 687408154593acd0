"""Induction: random words, and then the same words again; the next one is to be predicted.

After Olsson et al. 2022 (arXiv:2209.11895); corrupted: the first time other words stand there, so
nothing says how the second time goes on.
"""

from __future__ import annotations

import random

from edgeprune.tasks.vocabulary import WORDS

SHORTEST, LONGEST = 5, 8
"""Number of words before they repeat."""


def sample(rng: random.Random) -> dict:
    """One example; every word is preceded by a space, the first one too."""
    length = rng.randint(SHORTEST, LONGEST)
    words = rng.sample(WORDS, 2 * length)
    words, others = words[:length], words[length:]
    repeated = rng.randint(2, length - 1)
    answer = words[repeated]
    distractor = rng.choice([w for w in words if w not in (answer, words[repeated - 1])])
    again = " ".join(words[:repeated])
    return {
        "clean": f" {' '.join(words)} {again}<predict> {answer}</predict>",
        "corrupted": f" {' '.join(others)} {again}<predict> {others[repeated]}</predict>",
        "distractor": f" {distractor}",
    }
