"""Induction: random words and then some of them again; the task is to predict the next one.

After Olsson et al. 2022 (arXiv:2209.11895). In the corrupted prompt the first sequence consists of
other words, so that it does not tell how the second one continues. A space precedes every word,
including the first.
"""

import random

from edgeprune.prompts.tasks.vocabulary import WORDS


def sample(rng: random.Random, lengths: tuple[int, int] = (5, 8), comma: str = "") -> dict:
    """Draw one example with a number of words in the range `lengths`, each followed by `comma`."""
    length = rng.randint(*lengths)
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
