"""Tracr: compiled transformers whose true circuit is known (Lindner et al. 2023, arXiv:2301.05062).

A folder has `config.json` (sizes, tokens, kind of output), `weights.safetensors` and
`examples.jsonl`. The transformer has ReLU MLPs, bidirectional or causal attention, and no norms.
Every prompt begins with BOS. The outputs are values, not logits: per position, a one-hot vector
(the largest column is the answer) or a single number.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.engine.heads import project_from_heads, project_to_heads
from edgeprune.errors import DataError, ModelError
from edgeprune.graph import CircuitGraph
from edgeprune.metrics import Output
from edgeprune.paths import TRACR_MODELS
from edgeprune.prompts import Pair

CONFIG, WEIGHTS = "config.json", "weights.safetensors"

OUTPUTS = {"categorical": Output.one_hot, "numerical": Output.number}
"""`output_type` of config.json -> what the outputs are."""

SIZES = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx", "d_out")
"""The sizes in config.json."""


def find_folder(name_or_path: str | Path) -> Path | None:
    """The folder of a Tracr model, or None for anything else; `tracr/NAME` is an included model."""
    path = Path(name_or_path)
    if not path.exists() and path.parts[:1] == ("tracr",) and len(path.parts) == 2:
        path = TRACR_MODELS / path.name
    return path if (path / WEIGHTS).is_file() and (path / CONFIG).is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check a folder's config.json.

    Raises:
        ModelError: not JSON, a field is missing, or the kind of model is not supported.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    needed = (*SIZES, "causal", "output_type", "token_to_id", "bos_id", "reference_seq_len")
    missing = [name for name in needed if name not in config]
    if missing:
        raise ModelError(f"{path} lacks {', '.join(missing)}; expected a Tracr model's config")
    if config["output_type"] not in OUTPUTS:
        raise ModelError(
            f"{path}: output_type is {config['output_type']!r}, expected {' or '.join(OUTPUTS)}"
        )
    if config.get("activation", "relu") != "relu" or config.get("layer_norm", False):
        raise ModelError(f"{path}: only ReLU without layer norm is supported")
    return config


@dataclass(frozen=True)
class TracrTokenizer:
    """Takes the place of a tokenizer: knows the names of tokens and outputs.

    Attributes:
        folder: the folder of the model, which has examples.jsonl.
        config: the folder's config.json.
    """

    folder: Path
    config: dict[str, Any]

    @cached_property
    def names(self) -> list[str]:
        """Per output column, the name of the output."""
        values = self.config.get("output_decoding", {}).get("values")
        return values or [str(column) for column in range(self.config["d_out"])]

    @property
    def num_outputs(self) -> int:
        """Number of output columns."""
        return self.config["d_out"]

    @property
    def gives_numbers(self) -> bool:
        """Whether the output is the answer itself instead of one column per answer."""
        return OUTPUTS[self.config["output_type"]] is Output.number

    def __call__(self, *arguments: Any, **settings: Any) -> None:
        """Raises DataError: there is no text to tokenise."""
        raise DataError(
            "this Tracr model takes token ids, not text: use task=tracr, or lines with clean_ids, "
            "corrupted_ids and target_ids"
        )

    def __len__(self) -> int:
        return self.config["d_vocab"]

    def decode(self, ids: list[int]) -> str:
        """The names of output columns."""
        return " ".join(str(self.names[column]) for column in ids)


# ------------------------------------------------------------------------------------ the modules


class TracrLayer(nn.Module):
    """One layer, run as a whole or as an `architecture.Block`."""

    fused = False

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor], prefix: str) -> None:
        super().__init__()

        def weight(name: str) -> Tensor:
            return weights[f"{prefix}{name}"]

        self.num_heads, self.d_head = config["n_heads"], config["d_head"]
        self.scaling = config.get("attn_scale", config["d_head"] ** -0.5)
        self.causal = config["causal"]
        # [3 * head, d_head, d_model] and [3 * head, d_head]: all heads' q, then k, then v.
        qkv = torch.cat([weight(f"attn.W_{part}") for part in "QKV"]).transpose(1, 2)
        self.qkv_weight = nn.Parameter(qkv.contiguous())
        self.qkv_bias = nn.Parameter(torch.cat([weight(f"attn.b_{part}") for part in "QKV"]))
        self.attention_norm = nn.Identity()
        self.attention_output = _linear(weight("attn.W_O").flatten(0, 1), weight("attn.b_O"))
        self.mlp_norm = nn.Identity()
        self.mlp = nn.Sequential(
            _linear(weight("mlp.W_in"), weight("mlp.b_in")),
            nn.ReLU(),
            _linear(weight("mlp.W_out"), weight("mlp.b_out")),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, d_model], with the outputs added."""
        normed = self.attention_norm(x)
        x = x + self.attention_output(self.attend(normed.expand(3 * self.num_heads, *x.shape)))
        return x + self.mlp(self.mlp_norm(x))

    def attend(self, x: Tensor, inputs: None = None) -> Tensor:
        """[3 * head, batch, pos, d_model] -> [batch, pos, head * d_head]."""
        _, batch, pos, _ = x.shape
        qkv = project_to_heads(x, nn.Identity(), [self.qkv_weight], self.qkv_bias)
        q, k, v = qkv.view(3, self.num_heads, batch, pos, self.d_head)
        scores = q @ k.transpose(-1, -2) * self.scaling  # [head, batch, pos, pos]
        if self.causal:
            future = torch.ones(pos, pos, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        values = scores.softmax(-1) @ v  # [head, batch, pos, d_head]
        return values.permute(1, 2, 0, 3).reshape(batch, pos, self.num_heads * self.d_head)

    def scale(self, values: Tensor) -> Tensor:
        return values

    @property
    def layer(self) -> nn.Module:
        return self

    @property
    def mlp_output(self) -> nn.Module:
        return self.mlp

    def head_delta(
        self, values: Tensor, ablation_values: Tensor | None, *, centred: bool
    ) -> Tensor:
        """See `project_from_heads`."""
        linear = self.attention_output
        weight = linear.weight.T.reshape(self.num_heads, self.d_head, -1)
        return project_from_heads(values, ablation_values, weight, linear.bias, centred=centred)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Make a linear layer from a weight [in, out] and a bias [out]."""
    linear = nn.Linear(*weight.shape, bias=bias is not None)
    linear.weight = nn.Parameter(weight.T.contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


class TracrTransformer(nn.Module):
    """The whole model except for the output projection."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            max_position_embeddings=config["n_ctx"],
            hidden_size=config["d_model"],
            vocab_size=config["d_vocab"],
        )
        self.tok_embed = nn.Embedding.from_pretrained(weights["tok_embed"])
        self.pos_embed = nn.Parameter(weights["pos_embed"])
        self.layers = nn.ModuleList(
            TracrLayer(config, weights, f"blocks.{layer}.") for layer in range(config["n_layers"])
        )
        self.final_norm = nn.Identity()
        self.unembed = _linear(weights["unembed"])

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok_embed

    def forward(self, inputs_embeds: Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = inputs_embeds + self.pos_embed[: inputs_embeds.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(last_hidden_state=self.final_norm(x))


class Tracr:
    """A loaded Tracr model with its parts named; see `architecture.Architecture`."""

    embedding_writers = ("tok_embeds", "pos_embeds")

    def __init__(self, body: TracrTransformer, config: dict[str, Any]) -> None:
        self.body = body
        self.blocks = list(body.layers)
        self.final_norm = body.final_norm
        self.logits = self.unembed = body.unembed  # final states [..., d_model] -> [..., column]
        self.output = OUTPUTS[config["output_type"]]
        self.may_pad = config["causal"]  # padding is not masked

    def embed(self, ids: Tensor) -> Tensor:
        """[batch, pos] -> [2, batch, pos, d_model]: token and position embeddings."""
        tokens = self.body.tok_embed(ids)
        positions = self.body.pos_embed[: ids.shape[1]].to(tokens.dtype)
        return torch.stack([tokens, positions.expand_as(tokens)])

    def attention_inputs(self, embeddings: Tensor) -> None:
        return None


# ---------------------------------------------------------------------------------------- loading


def load(folder: Path, *, embedding_writers: bool) -> CircuitModel:
    """Load a Tracr model in float32 on the CPU.

    Args:
        folder: its folder.
        embedding_writers: whether the embeddings are writers with edges of their own.

    Raises:
        ModelError: a file cannot be read, or the tensors do not match the config.
    """
    config = read_config(folder)
    weights = _read_weights(folder / WEIGHTS, config)
    body = TracrTransformer(config, weights).requires_grad_(False).eval()
    graph = CircuitGraph(
        num_layers=config["n_layers"],
        num_heads=config["n_heads"],
        num_kv_heads=config["n_heads"],
        embedding_writers=Tracr.embedding_writers if embedding_writers else (),
    )
    tokenizer = TracrTokenizer(folder, config)
    return CircuitModel(Tracr(body, config), graph, tokenizer, str(folder), config)


def _read_weights(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in weights:
            raise ModelError(f"{path} has no tensor {name!r}")
        if tuple(weights[name].shape) != shape:
            found = list(weights[name].shape)
            raise ModelError(f"{path}: {name} is {found}, expected {list(shape)} from {CONFIG}")
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise ModelError(f"{path}: unexpected tensors {', '.join(unknown)}")
    return {name: weight.float() for name, weight in weights.items()}


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in `weights.safetensors`."""
    layers, heads, d_model, d_head, d_mlp, d_vocab, n_ctx, d_out = (config[s] for s in SIZES)
    shapes = {
        "tok_embed": (d_vocab, d_model),
        "pos_embed": (n_ctx, d_model),
        "unembed": (d_model, d_out),
    }
    for layer in range(layers):
        for part in "QKV":
            shapes[f"blocks.{layer}.attn.W_{part}"] = (heads, d_model, d_head)
            shapes[f"blocks.{layer}.attn.b_{part}"] = (heads, d_head)
        shapes |= {
            f"blocks.{layer}.attn.W_O": (heads, d_head, d_model),
            f"blocks.{layer}.attn.b_O": (d_model,),
            f"blocks.{layer}.mlp.W_in": (d_model, d_mlp),
            f"blocks.{layer}.mlp.b_in": (d_mlp,),
            f"blocks.{layer}.mlp.W_out": (d_mlp, d_model),
            f"blocks.{layer}.mlp.b_out": (d_model,),
        }
    return shapes


def random_pairs(config: dict[str, Any]) -> list[Pair]:
    """Eight pairs of random prompts of the maximum length, for the parity check."""
    special = (config["bos_id"], config.get("pad_id"))
    tokens = [t for t in config["token_to_id"].values() if t not in special]
    draw = random.Random(0)

    def prompt() -> tuple[int, ...]:
        return (config["bos_id"], *draw.choices(tokens, k=config["n_ctx"] - 1))

    return [Pair(prompt(), prompt(), (0,) * (config["n_ctx"] - 1)) for _ in range(8)]
