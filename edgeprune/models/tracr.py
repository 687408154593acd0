"""Tracr: compiled transformers whose true circuit is known (Lindner et al. 2023, arXiv:2301.05062).

A folder holds `config.json` (sizes, tokens, how outputs are read), `weights.safetensors` and
`examples.jsonl`. The transformer has no norms, ReLU MLPs, bidirectional or causal attention, and
every prompt begins with BOS. Its outputs are values, not logits: a one-hot vector a position (the
largest column is the answer) or a single number.
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

from edgeprune.engine.heads import project_from_heads, project_to_heads
from edgeprune.errors import DataError, ModelError
from edgeprune.graph import CircuitGraph
from edgeprune.metrics import Output
from edgeprune.paths import TRACR_MODELS
from edgeprune.prompts import Pair

CONFIG, WEIGHTS, EXAMPLES = "config.json", "weights.safetensors", "examples.jsonl"

OUTPUTS = {"categorical": Output.one_hot, "numerical": Output.number}
"""`output_type` of the config -> what the outputs are."""

NO_NORM = nn.Identity()

SIZES = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx", "d_out")


def find_folder(name_or_path: str | Path) -> Path | None:
    """The folder of a Tracr model, or None where the name or path is of something else.

    `tracr/NAME` is the model of that name which comes with the project.
    """
    path = Path(name_or_path)
    if not path.exists() and path.parts[:1] == ("tracr",) and len(path.parts) == 2:
        path = TRACR_MODELS / path.name
    return path if (path / WEIGHTS).is_file() and (path / CONFIG).is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, checked.

    Raises:
        ModelError: not JSON, a missing field, or a kind of model which is not run here.
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
    """What stands in for a tokenizer: the names of tokens and outputs, and the folder's examples.

    Attributes:
        folder: where examples.jsonl lies.
        config: the folder's config.json.
    """

    folder: Path
    config: dict[str, Any]

    @cached_property
    def names(self) -> list[str]:
        """The output of each column."""
        values = self.config.get("output_decoding", {}).get("values")
        return values or [str(column) for column in range(self.config["d_out"])]

    @property
    def num_outputs(self) -> int:
        """Columns of the output."""
        return self.config["d_out"]

    @property
    def gives_numbers(self) -> bool:
        """Whether the output is the answer itself, and not a column for each answer."""
        return OUTPUTS[self.config["output_type"]] is Output.number

    def __call__(self, *arguments: Any, **settings: Any) -> None:
        """Refuses text."""
        raise DataError(
            "this Tracr model takes token ids, not text: use task=tracr, or lines with clean_ids, "
            "corrupted_ids and target_ids"
        )

    def __len__(self) -> int:
        return self.config["d_vocab"]

    def decode(self, ids: list[int]) -> str:
        """The names of outputs given by column."""
        return " ".join(str(self.names[column]) for column in ids)


# ------------------------------------------------------------------------------------ the modules


class TracrLayer(nn.Module):
    """One layer, run as a whole; its parts are named as `Block` wants them."""

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
        """[batch, pos, d_model] -> the same, the layer's outputs added."""
        normed = self.attention_norm(x)
        x = x + self.attention_output(self.attend(normed.expand(3 * self.num_heads, *x.shape)))
        return x + self.mlp(self.mlp_norm(x))

    def attend(self, x: Tensor, inputs: None = None) -> Tensor:
        """Queries, keys and values from an input of their own each.

        Args:
            x: [3 * head, batch, pos, d_model]; all heads' q, then k, then v.
            inputs: nothing is needed beside.

        Returns:
            The heads' values, [batch, pos, head * d_head].
        """
        _, batch, pos, _ = x.shape
        qkv = project_to_heads(x, NO_NORM, [self.qkv_weight], self.qkv_bias)
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

    def head_delta(self, values: Tensor, closed: Tensor | None, *, centred: bool) -> Tensor:
        """See `project_from_heads`."""
        linear = self.attention_output
        weight = linear.weight.T.reshape(self.num_heads, self.d_head, -1)
        return project_from_heads(values, closed, weight, linear.bias, centred=centred)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """From [in, out] and [out]."""
    linear = nn.Linear(*weight.shape, bias=bias is not None)
    linear.weight = nn.Parameter(weight.T.contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear


class TracrTransformer(nn.Module):
    """The whole model but for the unembedding."""

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
    """A loaded Tracr model with its parts named."""

    embedding_writers = ("tok_embeds", "pos_embeds")

    def __init__(self, body: TracrTransformer, config: dict[str, Any]) -> None:
        self.body = body
        self.blocks = list(body.layers)
        self.final_norm = body.final_norm
        self.logits = self.unembed = body.unembed  # final states [..., d_model] -> [..., column]
        self.output = OUTPUTS[config["output_type"]]
        self.may_pad = config["causal"]  # PAD is never masked: only the future is not seen

    def embed(self, ids: Tensor) -> Tensor:
        """[batch, pos] -> [2, batch, pos, d_model]: token and position embeddings."""
        tokens = self.body.tok_embed(ids)
        positions = self.body.pos_embed[: ids.shape[1]].to(tokens.dtype)
        return torch.stack([tokens, positions.expand_as(tokens)])

    def attention_inputs(self, embeddings: Tensor) -> None:
        return None


# ---------------------------------------------------------------------------------------- loading


def build(folder: Path) -> tuple[Tracr, dict[str, Any]]:
    """Read a folder's weights.

    Raises:
        ModelError: a file that cannot be read, or tensors that are not those of the config.
    """
    config = read_config(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in weights:
            raise ModelError(f"{folder / WEIGHTS} has no tensor {name!r}")
        if list(weights[name].shape) != list(shape):
            raise ModelError(
                f"{folder / WEIGHTS}: {name} is {list(weights[name].shape)}, expected "
                f"{list(shape)} by {CONFIG}"
            )
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise ModelError(f"{folder / WEIGHTS}: unexpected tensors {', '.join(unknown)}")
    body = TracrTransformer(config, {name: w.float() for name, w in weights.items()})
    return Tracr(body.requires_grad_(False).eval(), config), config


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that `weights.safetensors` holds, by name."""
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


def build_graph(config: dict[str, Any], *, embedding_writers: bool) -> CircuitGraph:
    return CircuitGraph(
        num_layers=config["n_layers"],
        num_heads=config["n_heads"],
        num_kv_heads=config["n_heads"],
        embedding_writers=Tracr.embedding_writers if embedding_writers else (),
    )


def random_pairs(config: dict[str, Any]) -> list[Pair]:
    """Prompts of random tokens after BOS, as long as the model takes them."""
    special = (config["bos_id"], config.get("pad_id"))
    tokens = [t for t in config["token_to_id"].values() if t not in special]
    draw = random.Random(0)

    def prompt() -> tuple[int, ...]:
        return (config["bos_id"], *draw.choices(tokens, k=config["n_ctx"] - 1))

    return [Pair(prompt(), prompt(), (0,) * (config["n_ctx"] - 1)) for _ in range(8)]
