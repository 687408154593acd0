"""Induction: random words, then some of them again; the word that followed them is to be predicted.

After Olsson et al. 2022 (arXiv:2209.11895), but the repetition starts anywhere, so that positions
alone do not give the answer. Corrupted: the first time other words stand there, so nothing says how
the second time goes on.
"""

from __future__ import annotations

import random

from edgeprune.tasks.vocabulary import WORDS

SHORTEST, LONGEST = 6, 10
"""Number of words before some of them come again."""


def sample(rng: random.Random) -> dict:
    """One example; every word is preceded by a space, the first one too."""
    length = rng.randint(SHORTEST, LONGEST)
    words = rng.sample(WORDS, 2 * length)
    words, others = words[:length], words[length:]
    start = rng.randrange(length - 1)
    end = rng.randrange(start + 1, length)
    again, answer = " ".join(words[start:end]), words[end]
    distractor = rng.choice([word for word in words if word not in (answer, words[end - 1])])
    return {
        "clean": f" {' '.join(words)} {again}<predict> {answer}</predict>",
        "corrupted": f" {' '.join(others)} {again}<predict> {others[end]}</predict>",
        "distractor": f" {distractor}",
    }
