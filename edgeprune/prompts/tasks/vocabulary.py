"""Names, places, objects and words from which the tasks are written: words.json, by kind."""

import json
from pathlib import Path

_WORDS = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))

MALE_NAMES, FEMALE_NAMES, PLACES, OBJECTS, EVENTS, ADJECTIVES, ROLES, WORDS = (
    tuple(words) for words in _WORDS.values()
)
"""`WORDS` are those of the induction tasks; none is a place or an object of the other tasks."""
