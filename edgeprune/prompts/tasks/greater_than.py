"""Greater-than: "The war lasted from the year 1732 to the year 17" -> 33, 34, ..., 99.

After Hanna et al. 2023 (arXiv:2305.00586); corrupted: the start year ends in 01, so every end is
later. All later ends are right answers, all others distractors; the metric is the difference of
their probabilities. For tokenizers which read numbers digit by digit there is a form with one digit
to predict: "1237 to the year 123" -> 8, 9, corrupted by 1230.
"""

from __future__ import annotations

import random

from edgeprune.prompts.tasks.vocabulary import EVENTS


def sample(rng: random.Random, digits: int = 2) -> dict:
    """One example with `digits` (1 or 2) digits to predict.

    The end in <predict> is one of the right ones: each further year is half as likely.
    """
    last = 10**digits - 1
    lowest = 1 if digits == 2 else 0  # the corrupted start
    century = rng.randint(11, 18) if digits == 2 else rng.randint(110, 189)
    start = rng.randint(lowest + 1, last - 1)
    end = start + 1
    while end < last and rng.random() < 0.5:
        end += 1
    event = rng.choice(EVENTS)

    def prompt(year: int) -> str:
        return f"The {event} lasted from the year {century}{year:0{digits}} to the year {century}"

    ends = [f"{year:0{digits}}" for year in range(last + 1)]
    return {
        "clean": f"{prompt(start)}<predict>{ends[end]}</predict>",
        "corrupted": f"{prompt(lowest)}<predict>{ends[end]}</predict>",
        "answers": ends[start + 1 :],
        "distractor": ends[: start + 1],
    }
