"""What `edgeprune tokens` and the page show of attributions to tokens: tables, words and data."""

from collections.abc import Mapping
from itertools import chain
from statistics import fmean
from typing import Any

from edgeprune.config import TOKEN_TARGETS
from edgeprune.evaluation.table import Table
from edgeprune.evaluation.tokens import TokenAttributions

MAX_ROWS = 10
"""Maximum number of kinds of tokens, and of nodes, in tables."""
SMALLEST_SHOWN = 0.02
"""Conductances whose magnitude is at most this fraction of the effect are not on the page."""


def token_tables(result: TokenAttributions, title: str) -> list[Table]:
    """Mean attributions of tokens, and mean conductances of nodes at tokens."""
    models = result.models()
    by_label = {model: result.by_label(model) for model in models}
    leads = {model: result.leaders(model) for model in models}
    labels = sorted(by_label[models[0]], key=lambda label: -fmean(by_label[models[0]][label]))
    rows = [
        [label, *chain(*((f"{fmean(by_label[model][label]):+.3g}", f"{leads[model][label]:.0%}")
                         for model in models))]
        for label in labels[:MAX_ROWS]
    ]  # fmt: skip
    columns = [f"{model}:\n{name}" for model in models for name in ("attribution", "leads in")]
    tokens = Table(["", *columns], rows, title)
    cells = [
        [(f"{node} at {label}", f"{mean:+.3g}")
         for (node, label), mean in result.by_node(model).items() if not node.endswith("embeds")]
        for model in models
    ]  # fmt: skip
    rows = [[*chain(*row)] for row in zip(*cells, strict=True)][:MAX_ROWS]
    columns = [text for model in models for text in ("", f"{model}:\nconductance")]
    return [tokens, Table(columns, rows, "Through which nodes, at which tokens")]


def in_words(result: TokenAttributions) -> str:
    """What was found, in a few sentences."""
    answers, sentences = result.answers, []
    for model in result.models():
        through = [answer.through[model] for answer in answers]
        start = fmean(each.corrupted[result.target] for each in through)
        stop = fmean(each.clean[result.target] for each in through)
        leads = result.leaders(model)
        first = max(leads, key=leads.__getitem__)
        worst = max(each.error for each in through)
        sentences.append(
            f"Through the {model}, {TOKEN_TARGETS[result.target]} goes from {start:.3g} on the "
            f"corrupted prompts to {stop:.3g} on the clean ones; {first} has the largest "
            f"attribution in {leads[first]:.0%} of {len(answers)} answers. The attributions sum to "
            f"the effect within {result.error(model):.2%} (at worst {worst:.2%})."
        )
    sentences.append(
        "A token is compared with the one in its place in the corrupted prompt, so tokens that are "
        "the same in both have no attribution, whatever the model does with them."
    )
    return " ".join(sentences)


def tokens_data(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a tokens.json; of conductances only large ones, [position, value]."""

    def rows(through: Mapping[str, Any]) -> dict[str, list]:
        least = SMALLEST_SHOWN * abs(through["effect"])
        found = {
            node: [[i, value] for i, value in enumerate(row) if abs(value) > least]
            for node, row in zip(record["nodes"], through["nodes"], strict=True)
            if not node.endswith("embeds")
        }
        return {node: row for node, row in found.items() if row}

    target = record["target"]
    return {
        "about": TOKEN_TARGETS[target], "split": record["split"], "error": record["error"],
        "answers": [
            {
                **{key: answer[key] for key in ("tokens", "corrupted", "answer", "distractor")},
                "through": {
                    model: {
                        "ends": [through["corrupted"][target], through["clean"][target]],
                        "tokens": through["tokens"], "nodes": rows(through),
                    }
                    for model, through in answer["through"].items()
                },
            }
            for answer in record["answers"]
        ],
    }  # fmt: skip
