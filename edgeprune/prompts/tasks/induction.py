"""Induction: random words, and then the same words again; the next one is to be predicted.

After Olsson et al. 2022 (arXiv:2209.11895); corrupted: the first time other words stand there, so
nothing says how the second time goes on. Every word is preceded by a space, the first one too.
"""

from __future__ import annotations

import random

from edgeprune.prompts.tasks.vocabulary import WORDS


def sample(rng: random.Random) -> dict:
    """Five to eight words."""
    return _sample(rng, rng.randint(5, 8), "")


def sample_list(rng: random.Random) -> dict:
    """Ten to twelve words with commas: a list, with which a language model goes on more surely."""
    return _sample(rng, rng.randint(10, 12), ",")


def _sample(rng: random.Random, length: int, comma: str) -> dict:
    words = rng.sample(WORDS, 2 * length)
    words, others = words[:length], words[length:]
    repeated = rng.randint(2, length - 1)
    answer = words[repeated]
    distractor = rng.choice([w for w in words if w not in (answer, words[repeated - 1])])

    def prompt(first: list[str]) -> str:
        return "".join(f" {word}{comma}" for word in [*first, *words[:repeated]])

    return {
        "clean": f"{prompt(words)}<predict> {answer}</predict>",
        "corrupted": f"{prompt(others)}<predict> {others[repeated]}</predict>",
        "distractor": f" {distractor}",
    }
