"""run_scripts/ioi_heads.py: which positions it finds and how it averages attention."""

import ioi_heads
import pytest
import torch

from edgeprune.models.load import load_model

PROMPTS = (
    ("When Mary and John got to the park, John gave a ring to<predict> Mary</predict>", " John"),
    ("John and Mary left. John gave a ring to<predict> Mary</predict>", " John"),  # S comes first
)


@pytest.mark.parametrize(("clean", "subject"), PROMPTS)
def test_names_are_found_in_the_prompt(tokenizer, clean, subject):
    ids, at = ioi_heads.positions({"clean": clean, "distractor": subject}, tokenizer)
    words = [tokenizer.decode([token]).strip() for token in ids[0].tolist()]
    assert [words[at[name]] for name in ("IO", "S1", "S2", "END")] == ["Mary", "John", "John", "to"]
    assert at["S1"] < at["S2"] < at["END"]


def test_attention_is_averaged_over_the_right_positions():
    """Without queries and keys attention is uniform over the past."""
    model = load_model("embedded", device="cpu", attention="eager")
    for block in model.architecture.blocks:
        block.attention.c_attn.weight.data.zero_()
        block.attention.c_attn.bias.data.zero_()
    clean, subject = PROMPTS[0]
    record = {"clean": clean, "distractor": subject}
    ids, at = ioi_heads.positions(record, model.tokenizer)
    scores = ioi_heads.attention_to_kinds(model, [record])
    length = ids.shape[1]
    previous = sum(1 / (query + 1) for query in range(2, length)) / (length - 2)
    second, end = 1 / (at["S2"] + 1), 1 / length
    wanted = torch.tensor([previous, second, second, end, end])
    torch.testing.assert_close(scores, wanted.expand_as(scores), atol=1e-5, rtol=1e-4)
