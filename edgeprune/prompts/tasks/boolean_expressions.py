"""Boolean expressions: "((not False) and False) or True is" -> " True".

After Suzgun et al. 2023 (BIG-Bench Hard, arXiv:2210.09261), posed with an instruction or with
few-shot examples as in Bhaskar et al. 2024 (arXiv:2406.16778). The corrupted prompt has the same
expression with one word replaced (True and False, or `and` and `or`, by each other) such that the
value changes. Thus both prompts have equally many tokens, and the answer depends on that word.

The instruction uses the chat markup of Llama 2, on which CodeLlama was trained. Tokenizers that
split `True` get short forms, without system prompt and with a single example.
"""

import random
from collections.abc import Iterator

Expression = str | tuple
"""An expression tree: 'True', 'False', ('not', x), ('and', x, y) or ('or', x, y)."""

OTHER = {"True": "False", "False": "True", "and": "or", "or": "and"}
"""Maps each word to its replacement in a corrupted prompt."""
NEGATED = 0.3
"""Probability that a literal or a part in parentheses is negated."""

SYSTEM_PROMPT = "<<SYS>>\nIs this Boolean expression 'True' or 'False'?\n<</SYS>>\n\n"
EXAMPLES = (
    "True and (not False) is True",
    "(False or True) and False is False",
    "not (True and False) is True",
)


def value(expression: Expression) -> bool:
    """Evaluate an expression."""
    if isinstance(expression, str):
        return expression == "True"
    operator, *operands = expression
    values = [value(operand) for operand in operands]
    return {"not": not values[0], "and": all(values), "or": any(values)}[operator]


def text(expression: Expression, inner: bool = False) -> str:
    """Write an expression in Python syntax, with every inner expression in parentheses."""
    if isinstance(expression, str):
        return expression
    operator, *operands = expression
    parts = [text(operand, inner=True) for operand in operands]
    written = f"not {parts[0]}" if operator == "not" else f" {operator} ".join(parts)
    return f"({written})" if inner else written


def random_expression(rng: random.Random, literals: int) -> Expression:
    """Draw a tree with the given number of literals."""
    if literals == 1:
        expression: Expression = rng.choice(("True", "False"))
    else:
        left = rng.randint(1, literals - 1)
        operands = (random_expression(rng, n) for n in (left, literals - left))
        expression = (rng.choice(("and", "or")), *operands)
    return ("not", expression) if rng.random() < NEGATED else expression


def with_one_word_replaced(expression: Expression) -> Iterator[Expression]:
    """Yield every expression that differs in one literal or one `and` or `or`."""
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
    """Draw one example of 2 to 4 literals (short: 3) in the form `instruction` or `few_shot`."""
    wanted = rng.random() < 0.5
    literals = rng.randint(2, 3 if short else 4)
    changed: list[Expression] = []
    while not changed:  # "True or True" stays true whichever word is replaced
        expression = random_expression(rng, literals)
        if value(expression) == wanted:
            changed = [e for e in with_one_word_replaced(expression) if value(e) != wanted]
    corrupted = rng.choice(changed)
    if form == "instruction":
        prompt, gap = f"[INST] {'' if short else SYSTEM_PROMPT}{{}} [/INST] '", ""
    else:
        prompt, gap = "\n".join((*EXAMPLES[: 1 if short else None], "{} is")), " "
    # An answer of several tokens is fed back to the model, so both prompts need the same number.
    answer = wanted if short else not wanted
    return {
        "clean": f"{prompt.format(text(expression))}<predict>{gap}{wanted}</predict>",
        "corrupted": f"{prompt.format(text(corrupted))}<predict>{gap}{answer}</predict>",
        "distractor": f"{gap}{not wanted}",
    }
