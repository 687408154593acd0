"""Gendered pronouns: "So Evan is a really great friend, isn't" -> " he".

After Mathwin et al. 2023. The corrupted prompt has a name of the other gender.
"""

import random

from edgeprune.prompts.tasks.vocabulary import ADJECTIVES, FEMALE_NAMES, MALE_NAMES, ROLES

TEMPLATES = (
    "So {name} is a really {adjective} {role}, isn't",
    "So {name} is such a {adjective} {role}, isn't",
    "Well, {name} is a very {adjective} {role}, isn't",
    "I think {name} is a {adjective} {role}, isn't",
)


def sample(rng: random.Random) -> dict:
    """Draw one example; male and female names have equal chance."""
    genders = [(" he", MALE_NAMES), (" she", FEMALE_NAMES)]
    rng.shuffle(genders)
    (pronoun, names), (other_pronoun, other_names) = genders
    template = rng.choice(TEMPLATES)
    setting = {"adjective": rng.choice(ADJECTIVES), "role": rng.choice(ROLES)}
    clean = template.format(name=rng.choice(names), **setting)
    corrupted = template.format(name=rng.choice(other_names), **setting)
    return {
        "clean": f"{clean}<predict>{pronoun}</predict>",
        "corrupted": f"{corrupted}<predict>{other_pronoun}</predict>",
        "distractor": other_pronoun,
        "template": TEMPLATES.index(template),
    }
