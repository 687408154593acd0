"""Whereabouts: who is where after some moves; a few examples come first.

    Story: Emma went to the park. John walked to the bank. Emma hurried to the farm.
    Question: Where is Emma?
    Answer: farm

After the first task of bAbI (Weston et al. 2015, arXiv:1502.05698), with words of our own. In the
corrupted prompt, the last move of the person asked about leads to another place, so that the answer
differs. The distractor is another place of the story: a place where the person was before, or one
where somebody else is.
"""

import random

from edgeprune.prompts.tasks.vocabulary import FEMALE_NAMES, MALE_NAMES, PLACES

VERBS = ("went", "walked", "hurried", "returned", "drove", "cycled", "strolled")

EXAMPLES = (
    ("Olga walked to the kitchen. Boris drove to the lake. Olga hurried to the hall.",
     "Olga", "hall"),
    ("Boris returned to the pub. Tanya went to the gym. Tanya cycled to the shop. "
     "Boris strolled to the zoo.", "Tanya", "shop"),
)  # fmt: skip
"""Examples in front of every prompt: (story, name, answer); nobody there occurs elsewhere."""


def sample(rng: random.Random, num_facts: tuple[int, int] = (2, 8), num_people: int = 3) -> dict:
    """Draw one example with a number of facts, each a move, in the range `num_facts`."""
    people = rng.sample(MALE_NAMES + FEMALE_NAMES, num_people)
    count = rng.randint(*num_facts)
    movers = [rng.choice(people) for _ in range(count)]
    asked = rng.choice(movers)
    last = max(i for i, mover in enumerate(movers) if mover == asked)
    if len(set(movers)) == 1:  # somebody else has to be somewhere, too
        other = rng.choice([i for i in range(count) if i != last])
        movers[other] = next(person for person in people if person != asked)
    moves = [[mover, rng.choice(VERBS), rng.choice(PLACES)] for mover in movers]
    answer = moves[last][2]
    others = [place for place in PLACES if place not in {place for *_, place in moves}]
    wrong = sorted({place for *_, place in moves} - {answer})
    if not wrong:  # all went to the same place
        first = next(i for i in range(count) if i != last)
        moves[first][2] = others.pop(rng.randrange(len(others)))
        wrong = [moves[first][2]]
    corrupted_answer = rng.choice(others)

    def prompt(answer: str) -> str:
        places = [*(place for *_, place in moves[:last]), answer,
                  *(place for *_, place in moves[last + 1 :])]  # fmt: skip
        story = " ".join(
            f"{mover} {verb} to the {place}."
            for (mover, verb, _), place in zip(moves, places, strict=True)
        )
        asking = "".join(_text(*example) + f" {example[2]}\n\n" for example in EXAMPLES)
        return f"{asking}{_text(story, asked)}<predict> {answer}</predict>"

    return {
        "clean": prompt(answer),
        "corrupted": prompt(corrupted_answer),
        "distractor": f" {rng.choice(wrong)}",
    }


def _text(story: str, name: str, _: str = "") -> str:
    return f"Story: {story}\nQuestion: Where is {name}?\nAnswer:"
