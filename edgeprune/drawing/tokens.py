"""Attributions as text whose tokens are shaded, as one HTML file that loads nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from edgeprune.config import TOKEN_TARGETS
from edgeprune.drawing.report import render_template

RAISES, LOWERS = (0, 114, 178), (213, 94, 0)
"""Colours, in red, green and blue, of tokens that raise and that lower the answer's score."""
MAX_NODES = 8
"""Maximum number of nodes that are listed per model."""


class Shaded(NamedTuple):
    """A token as it is shown.

    Attributes:
        text: with visible line breaks and tabs.
        share: attribution as a fraction of the largest magnitude in the prompt, in [-1, 1].
        value: attribution, "" for none.
        corrupted: the token in its place in the corrupted prompt, "" if it is the same.
    """

    text: str
    share: float
    value: str
    corrupted: str


def shaded_tokens(answer: Mapping[str, Any], model: str) -> list[Shaded]:
    """The tokens of one of the answers of `TokenAttributions.to_dict`, through one model."""
    values = answer["through"][model]["tokens"]
    largest = max(map(abs, values)) or 1.0
    rows = zip(answer["tokens"], answer["corrupted"], values, strict=True)
    return [
        Shaded(
            _visible(token), value / largest, f"{value:+.2f}" if value else "",
            "" if other == token else _visible(other),
        )
        for token, other, value in rows
    ]  # fmt: skip


def mixed(share: float) -> tuple[int, int, int]:
    """The colour of a token with this share, in red, green and blue."""
    color = RAISES if share > 0 else LOWERS
    weight = 0.75 * abs(share)
    return tuple(round(255 + (part - 255) * weight) for part in color)


def scores_text(answer: Mapping[str, Any], model: str, target: str) -> str:
    """The scores of an answer on the corrupted and the clean prompt, in words."""
    through = answer["through"][model]
    start, stop = through["corrupted"], through["clean"]
    names = dict.fromkeys((target, "probability", "contrast"))
    return ", ".join(
        f"{name} {start[name]:.2f} → {stop[name]:.2f}" for name in names if stop[name] is not None
    )


def strongest_nodes(
    answer: Mapping[str, Any], model: str, nodes: list[str]
) -> list[tuple[str, str, str]]:
    """Node, token and conductance where it is largest in a prompt, without the embeddings."""

    def entries() -> Iterator[tuple[float, str, int]]:
        for node, row in zip(nodes, answer["through"][model]["nodes"], strict=True):
            if not node.endswith("embeds"):
                yield from ((value, node, position) for position, value in enumerate(row) if value)

    found = sorted(entries(), key=lambda entry: -abs(entry[0]))[:MAX_NODES]
    texts = [_visible(token) for token in answer["tokens"]]
    return [
        (node, f"{texts[position]} ({position + 1})", f"{value:+.2f}")
        for value, node, position in found
    ]


def render_tokens(data: dict[str, Any], title: str, notes: tuple[str, ...] = ()) -> str:
    """An HTML page of attributions, which are those of `TokenAttributions.to_dict`."""
    return render_template(
        "tokens.html.j2", title=title, notes=notes, data=data,
        about=TOKEN_TARGETS[data["target"]], colors=(RAISES, LOWERS),
        shaded_tokens=shaded_tokens, scores_text=scores_text, strongest_nodes=strongest_nodes,
    )  # fmt: skip


def _visible(token: str) -> str:
    """A token with visible line breaks and tabs; "∅" for an empty one."""
    text = token.replace("\n", "⏎").replace("\t", "⇥")
    return text or "∅"
