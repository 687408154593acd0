"""Attributions as a JSON file that Inseq (Sarti et al. 2023, arXiv:2302.13942) loads.

`inseq.FeatureAttributionOutput.load` restores the classes that the file names, and tensors from
safetensors in base64. As for all decoders in Inseq, a sequence's `target` is the prompt followed by
the predicted tokens, and `target_attributions` are [token, predicted], NaN for tokens that the
prediction does not see. Tested with version 0.7.1.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from safetensors.torch import save

STEP_SCORES = {
    "logit": "logit", "probability": "probability", "contrast": "contrast_logits_diff",
}  # fmt: skip
"""Inseq's names of the scores of an answer."""


def inseq_json(data: Mapping[str, Any], model: str) -> dict[str, Any]:
    """JSON values of a `FeatureAttributionOutput`: a sequence per prompt, through each model.

    Args:
        data: the result of `TokenAttributions.to_dict`.
        model: the model's name.
    """

    def prompt_and_start(numbered: tuple[int, Mapping[str, Any]]) -> tuple[int, int]:
        """The same for the answers to a prompt's tokens in a row."""
        number, answer = numbered
        return answer["prompt"], answer["step"] - number

    rows = groupby(enumerate(data["answers"]), prompt_and_start)
    prompts = [[answer for _, answer in row] for _, row in rows]
    models = list(data["error"])
    inputs = ["".join(answers[0]["tokens"]) for answers in prompts]
    texts = ["".join([*answers[-1]["tokens"], answers[-1]["answer"]]) for answers in prompts]
    return _instance("inseq.data.attribution", "FeatureAttributionOutput", {
        "sequence_attributions": [
            _sequence(answers, name) for name in models for answers in prompts
        ],
        "step_attributions": None,
        "info": {
            "attribution_method": "integrated_gradients", "attribute_target": True,
            "attributed_fn": STEP_SCORES[data["target"]], "model_name": model,
            "step_scores": list(STEP_SCORES.values()), "baseline": "corrupted prompt",
            "through": [name for name in models for _ in prompts], "ablation": data["ablation"],
            "input_texts": inputs * len(models), "generated_texts": texts * len(models),
        },
    })  # fmt: skip


def _sequence(answers: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """The answers to one prompt, each predicted from one more token than the one before."""
    last = answers[-1]
    tokens = [*last["tokens"], last["answer"]]
    ids = [*last["token_ids"], last["answer_ids"][0]]
    attributions = torch.full((len(tokens), len(answers)), math.nan)
    for column, answer in enumerate(answers):
        values = torch.tensor(answer["through"][model]["tokens"])
        attributions[: len(values), column] = values
    scores = [answer["through"][model]["clean"] for answer in answers]
    return _instance("inseq.data.attribution", "CoarseFeatureAttributionSequenceOutput", {
        "source": [],
        "target": [
            _instance("inseq.utils.typing", "TokenWithId", {"token": token, "id": number})
            for token, number in zip(tokens, ids, strict=True)
        ],
        "source_attributions": None,
        "target_attributions": _tensor(attributions),
        "step_scores": {
            name: _tensor(torch.tensor([
                math.nan if score[ours] is None else score[ours] for score in scores
            ]))
            for ours, name in STEP_SCORES.items()
        },
        "sequence_scores": None,
        "attr_pos_start": len(tokens) - len(answers), "attr_pos_end": len(tokens),
    })  # fmt: skip


def _instance(module: str, name: str, attributes: dict[str, Any]) -> dict[str, Any]:
    return {"__instance_type__": [module, name], "attributes": attributes}


def _tensor(values: torch.Tensor) -> str:
    return base64.b64encode(save({"attribution": values})).decode()
