"""Greater-than: "The war lasted from the year 1732 to the year 17" -> 33, 34, ..., 99.

After Hanna et al. 2023 (arXiv:2305.00586). In the corrupted prompt the start year ends in 01, so
that every end year is later. All later end years are right answers and all others distractors; the
metric is the difference of their probabilities. Tokenizers that split numbers into digits get a
variant with one digit to predict: "1237 to the year 123" -> 8, 9, corrupted to 1230.
"""

import random

from edgeprune.prompts.tasks.vocabulary import EVENTS


def sample(rng: random.Random, short: bool = False) -> dict:
    """Draw one example, if short with one digit to predict.

    The end year in <predict> is one of the right ones; each year is half as likely as the one
    before it.
    """
    digits, lowest = (1, 0) if short else (2, 1)  # start year of the corrupted prompt
    last = 10**digits - 1
    century = rng.randint(110, 189) if short else rng.randint(11, 18)
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
