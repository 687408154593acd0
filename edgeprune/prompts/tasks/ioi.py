"""Indirect object identification: "Mary and John went ... John gave a drink to" -> " Mary".

After Wang et al. 2023 (arXiv:2211.00593), with many templates in both orders. As in Bhaskar et al.
2024 (arXiv:2406.16778), the corrupted prompt has three other, distinct names.
"""

import random

from edgeprune.prompts.schema import split_prompt
from edgeprune.prompts.tasks.vocabulary import FEMALE_NAMES, MALE_NAMES, OBJECTS, PLACES

TEMPLATES = (
    "Then, {first} and {second} went to the {place}. {giver} gave a {object} to",
    "When {first} and {second} got to the {place}, {giver} handed a {object} to",
    "After {first} and {second} left the {place}, {giver} passed a {object} to",
    "While {first} and {second} were at the {place}, {giver} offered a {object} to",
    "Yesterday {first} and {second} met at the {place}, and {giver} gave a {object} to",
    "{first} and {second} spent the day at the {place}. {giver} bought a {object} for",
    "Once {first} and {second} had found the {place}, {giver} showed a {object} to",
    "Later, {first} and {second} walked to the {place}. {giver} brought a {object} to",
    "As {first} and {second} waited near the {place}, {giver} sold a {object} to",
    "{first} and {second} were working at the {place}. {giver} sent a {object} to",
    "Before {first} and {second} reached the {place}, {giver} lent a {object} to",
    "In the morning {first} and {second} visited the {place}, where {giver} gave a {object} to",
    "Because {first} and {second} liked the {place}, {giver} carried a {object} there for",
    "The {place} was quiet when {first} and {second} arrived. {giver} threw a {object} to",
    "Last week {first} and {second} cleaned the {place}. Then {giver} returned a {object} to",
    "At the {place}, {first} and {second} had an argument. {giver} still gave a {object} to",
)


def marks(record: dict) -> dict[str, int]:
    """Where the names end in a clean prompt: IO, the indirect object; S1 and S2, the subject.

    Raises KeyError or ValueError if the record is not one of `sample`.
    """
    prompt, answer = split_prompt(record, "clean")

    def end_of(name: str, start: int = 0) -> int:
        return prompt.index(name.strip(), start) + len(name.strip())

    first = end_of(record["distractor"])
    return {"IO": end_of(answer), "S1": first, "S2": end_of(record["distractor"], first)}


def sample(rng: random.Random, templates: tuple[str, ...] = TEMPLATES) -> dict:
    """Draw one example; giver and receiver come in either order (ABBA, BABA) with equal chance."""
    first, second, *others = rng.sample(MALE_NAMES + FEMALE_NAMES, 5)
    template = rng.choice(templates)
    setting = {"place": rng.choice(PLACES), "object": rng.choice(OBJECTS)}
    giver, receiver = rng.choice([(first, second), (second, first)])

    def prompt(first: str, second: str, giver: str) -> str:
        return template.format(first=first, second=second, giver=giver, **setting)

    return {
        "clean": f"{prompt(first, second, giver)}<predict> {receiver}</predict>",
        "corrupted": f"{prompt(*others)}<predict> {others[receiver != first]}</predict>",
        "distractor": f" {giver}",
        "template": templates.index(template),
    }
