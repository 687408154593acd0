"""Boolean expressions: "((not False) and False) or True is" -> " True".

After Suzgun et al. 2023 (BIG-Bench Hard, arXiv:2210.09261), asked for by an instruction or by
examples as in Bhaskar et al. 2024 (arXiv:2406.16778). Corrupted: the same expression with one word
replaced, a literal by the other one or `and` and `or` by each other, such that the value changes.
So both prompts have equally many tokens, the answer hinges on that word, and over many prompts on
every kind of word: what tells the two apart is what the model does with operators and literals.

The instruction has the chat markup of Llama 2, as CodeLlama was trained on. For tokenizers that
spell `True` in several tokens there are short forms, without system prompt and with a single
example.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

Expression = str | tuple
"""'True', 'False', ('not', x), ('and', x, y) or ('or', x, y)."""

OTHER = {"True": "False", "False": "True", "and": "or", "or": "and"}
FEWEST, MOST, MAX_IN_SHORT = 2, 4, 3
"""Literals of an expression."""
NEGATED = 0.3
"""Chance that a literal or a part in parentheses is negated."""

SHORT_INSTRUCTION = "[INST] {} [/INST] '"
INSTRUCTION = SHORT_INSTRUCTION.format(
    "<<SYS>>\nIs this Boolean expression 'True' or 'False'?\n<</SYS>>\n\n{}"
)
EXAMPLES = (
    "True and (not False) is True",
    "(False or True) and False is False",
    "not (True and False) is True",
)


def value(expression: Expression) -> bool:
    """What an expression evaluates to."""
    if isinstance(expression, str):
        return expression == "True"
    operator, *operands = expression
    if operator == "not":
        return not value(operands[0])
    return (all if operator == "and" else any)(map(value, operands))


def text(expression: Expression, inner: bool = False) -> str:
    """An expression as Python writes it; what stands inside another is in parentheses."""
    if isinstance(expression, str):
        return expression
    operator, *operands = expression
    parts = [text(operand, inner=True) for operand in operands]
    written = f"not {parts[0]}" if operator == "not" else f" {operator} ".join(parts)
    return f"({written})" if inner else written


def random_expression(rng: random.Random, literals: int) -> Expression:
    """A random tree with so many literals."""
    if literals == 1:
        expression: Expression = rng.choice(("True", "False"))
    else:
        left = rng.randint(1, literals - 1)
        operands = (random_expression(rng, n) for n in (left, literals - left))
        expression = (rng.choice(("and", "or")), *operands)
    return ("not", expression) if rng.random() < NEGATED else expression


def with_one_word_replaced(expression: Expression) -> Iterator[Expression]:
    """Every expression that differs in one literal or one `and` or `or`."""
    if isinstance(expression, str):
        yield OTHER[expression]
        return
    operator, *operands = expression
    if operator in OTHER:
        yield (OTHER[operator], *operands)
    for index, operand in enumerate(operands):
        for changed in with_one_word_replaced(operand):
            yield (operator, *operands[:index], changed, *operands[index + 1 :])


def sample(rng: random.Random, form: str, short: bool = False) -> dict:
    """One example, true and false with equal chance.

    Args:
        rng: draws it.
        form: `instruction` or `few_shot`.
        short: for tokenizers that spell `True` in several tokens.
    """
    wanted = rng.random() < 0.5
    literals = rng.randint(FEWEST, MAX_IN_SHORT if short else MOST)
    changed: list[Expression] = []
    while not changed:  # "True or True" is true whichever word is replaced
        expression = random_expression(rng, literals)
        if value(expression) == wanted:
            changed = [e for e in with_one_word_replaced(expression) if value(e) != wanted]
    corrupted = rng.choice(changed)
    if form == "instruction":
        prompt, gap = SHORT_INSTRUCTION if short else INSTRUCTION, ""
    else:
        examples = EXAMPLES[:1] if short else EXAMPLES
        prompt, gap = "\n".join((*examples, "{} is")), " "
    # In several tokens, those of the clean answer count here too; those of the other may be fewer.
    answer = wanted if short else not wanted
    return {
        "clean": f"{prompt.format(text(expression))}<predict>{gap}{wanted}</predict>",
        "corrupted": f"{prompt.format(text(corrupted))}<predict>{gap}{answer}</predict>",
        "distractor": f"{gap}{not wanted}",
    }


sample_instruction = partial(sample, form="instruction")
sample_few_shot = partial(sample, form="few_shot")
