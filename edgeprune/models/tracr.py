"""Tracr: compiled transformers whose true circuit is known (Lindner et al. 2023, arXiv:2301.05062).

A folder has `config.json` (sizes, tokens, kind of output), `weights.safetensors` and
`examples.jsonl`. The transformer has ReLU MLPs, bidirectional or causal attention, and no norms.
Every prompt begins with BOS. The outputs are values, not logits: per position, a one-hot vector
(the largest column is the answer) or a single number.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeprune.circuit import Circuit
from edgeprune.engine.architecture import Architecture, Block
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.engine.heads import attend, project_to_heads
from edgeprune.errors import DataError, ModelError
from edgeprune.metrics import Output
from edgeprune.paths import TRACR_MODELS

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
TRUTH = "ground_truth_edges.json"
"""The true edges, under zero ablation as `edges` and under interchange as `edges_patching`."""

OUTPUTS = {"categorical": Output.one_hot, "numerical": Output.number}
"""`output_type` of config.json -> what the outputs are."""

FIELDS = (
    "n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx", "d_out", "causal",
    "token_to_id", "bos_id", "reference_seq_len",
)  # fmt: skip
"""The fields that config.json must have, besides `output_type`."""


def find_folder(name_or_path: str | Path) -> Path | None:
    """The folder of a Tracr model, or None for anything else; `tracr/NAME` is an included model."""
    path = Path(name_or_path)
    if not path.exists() and path.parts[:1] == ("tracr",) and len(path.parts) == 2:
        path = TRACR_MODELS / path.name
        if not path.is_dir():
            names = ", ".join(sorted(folder.name for folder in TRACR_MODELS.iterdir()))
            raise ModelError(f"there is no included Tracr model {path.name!r}; choose {names}")
    return path if (path / WEIGHTS).is_file() and (path / CONFIG).is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json; raises ModelError unless it is that of a supported model."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    missing = [name for name in FIELDS if name not in config]
    kind = [config.get(key) for key in ("output_type", "activation", "layer_norm")]
    if missing or kind[0] not in OUTPUTS or kind[1] not in (None, "relu") or kind[2]:
        raise ModelError(
            f"{path} lacks {missing}, and output_type, activation and layer_norm are {kind}; "
            f"expected a Tracr model: {' or '.join(OUTPUTS)}, relu, no layer_norm"
        )
    return config


def true_circuit(model: CircuitModel, ablation: str) -> Circuit | None:
    """The true circuit of a Tracr model, if its folder states it for this kind of ablation.

    Raises ModelError if the file is damaged or the model's graph has not all of its edges.
    """
    folder = find_folder(model.name)
    if folder is None or not (folder / TRUTH).is_file():
        return None
    key = {"zero": "edges", "interchange": "edges_patching"}.get(ablation)
    try:
        edges = json.loads((folder / TRUTH).read_text(encoding="utf-8")).get(key)
        return None if edges is None else Circuit.from_edges(model.graph, edges)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / TRUTH} cannot be read: {error}") from None


class TracrTokenizer:
    """Takes the place of a tokenizer: knows a folder's config.json, tokens and outputs.

    `num_outputs` is the number of output columns; `gives_numbers` says whether the output is the
    answer itself instead of one column per answer.
    """

    bos_token = bos_token_id = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, read_config(folder)
        self.num_outputs = self.config["d_out"]
        self.gives_numbers = self.config["output_type"] == "numerical"

    def __call__(self, *arguments: Any, **settings: Any) -> None:
        """Raises DataError: there is no text to tokenise."""
        raise DataError("a Tracr model takes token ids, not text; use task=tracr or *_ids fields")

    def __len__(self) -> int:
        return self.config["d_vocab"]

    def decode(self, ids: list[int]) -> str:
        """The names of output columns."""
        names = self.config.get("output_decoding", {}).get("values") or range(self.num_outputs)
        return " ".join(str(names[column]) for column in ids)

    def decode_inputs(self, ids: list[int]) -> str:
        """The names of input tokens."""
        names = {token: name for name, token in self.config["token_to_id"].items()}
        return " ".join(str(names.get(token, token)) for token in ids)


class TracrLayer(nn.Module, Block):
    """One layer, run as a whole or head by head."""

    layer = property(lambda self: self)
    attention = property(lambda self: self)
    mlp_output = property(lambda self: self.mlp)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.num_heads, self.d_head = config["n_heads"], config["d_head"]
        self.scaling = config.get("attn_scale", config["d_head"] ** -0.5)
        self.causal = config["causal"]
        num_readers, d_model, d_mlp = 3 * self.num_heads, config["d_model"], config["d_mlp"]
        # all heads' q, then k, then v
        self.qkv_weight = nn.Parameter(torch.empty(num_readers, self.d_head, d_model))
        self.qkv_bias = nn.Parameter(torch.empty(num_readers, self.d_head))
        self.attention_norm, self.mlp_norm = nn.Identity(), nn.Identity()
        self.attention_output = nn.Linear(self.num_heads * self.d_head, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_mlp), nn.ReLU(), nn.Linear(d_mlp, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, d_model], with the outputs added."""
        normed = self.attention_norm(x)
        x = x + self.attention_output(self.attend(normed.expand(3 * self.num_heads, *x.shape)))
        return x + self.mlp(self.mlp_norm(x))

    def attend(self, x: Tensor, inputs: None = None) -> Tensor:
        """[3 * head, batch, pos, d_model] -> [batch, pos, head * d_head]."""
        pos = x.shape[2]
        qkv = project_to_heads(x, nn.Identity(), [self.qkv_weight], self.qkv_bias)
        q, k, v = qkv.unflatten(0, (3, -1)).transpose(1, 2)  # [batch, head, pos, d_head] each
        mask = x.new_full((pos, pos), -torch.inf).triu(1) if self.causal else None
        values, _ = attend(self, q, k, v, mask, scaling=self.scaling)
        return values.flatten(2)

    def output_weight(self, dtype: torch.dtype) -> Tensor:
        return self.attention_output.weight.T.unflatten(0, (-1, self.d_head))


class Tracr(nn.Module, Architecture):
    """The whole model."""

    embeddings = ("tok_embeds", "pos_embeds")
    body = property(lambda self: self)
    blocks = property(lambda self: self.layers)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        length, d_model, vocabulary = config["n_ctx"], config["d_model"], config["d_vocab"]
        self.config = SimpleNamespace(
            max_position_embeddings=length, hidden_size=d_model, vocab_size=vocabulary,
            _attn_implementation="eager",
        )  # fmt: skip
        self.output = OUTPUTS[config["output_type"]]
        self.may_pad = config["causal"]  # padding is not masked
        self.tok_embed = nn.Embedding(vocabulary, d_model)
        self.pos_embed = nn.Parameter(torch.empty(length, d_model))
        self.positions = nn.Identity()  # gives hooks the position embeddings
        self.embedding_modules = [self.tok_embed, self.positions]
        self.layers = nn.ModuleList(TracrLayer(config) for _ in range(config["n_layers"]))
        self.final_norm = nn.Identity()
        self.unembed = nn.Linear(d_model, config["d_out"], bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tok_embed

    def forward(self, inputs_embeds: Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = inputs_embeds + self.positions(self.pos_embed[None, : inputs_embeds.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(last_hidden_state=self.final_norm(x))

    def embed(self, ids: Tensor) -> Tensor:
        """[batch, pos] -> [2, batch, pos, d_model]: token and position embeddings."""
        tokens = self.tok_embed(ids)
        positions = self.pos_embed[: ids.shape[1]].to(tokens.dtype)
        return torch.stack([tokens, positions.expand_as(tokens)])


def load(folder: Path, *, embedding_writers: str) -> CircuitModel:
    """Load the Tracr model of a folder, in float32 on the CPU; see `load_model`."""
    tokenizer = TracrTokenizer(folder)
    config = tokenizer.config
    with torch.device("meta"):
        model = Tracr(config)
    try:
        state = _state_dict(load_file(folder / WEIGHTS), config["n_layers"])
        model.load_state_dict(state, assign=True)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder / WEIGHTS} does not fit {CONFIG}: {error}") from None
    counts = config["n_layers"], config["n_heads"], config["n_heads"]
    graph = model.graph(*counts, embedding_writers=embedding_writers)
    model.requires_grad_(False).eval()
    return CircuitModel(model, graph, tokenizer, str(folder), config)


def _state_dict(weights: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Rename a file's tensors as `Tracr` does, and transpose its matrices [in, out]."""
    state = {
        "tok_embed.weight": weights.pop("tok_embed"),
        "pos_embed": weights.pop("pos_embed"),
        "unembed.weight": weights.pop("unembed").T,
    }
    for layer in range(num_layers):
        file, own = f"blocks.{layer}.", f"layers.{layer}."
        for kind, name in ("W", "qkv_weight"), ("b", "qkv_bias"):
            state[own + name] = torch.cat([weights.pop(f"{file}attn.{kind}_{p}") for p in "QKV"])
        state[own + "qkv_weight"] = state[own + "qkv_weight"].transpose(1, 2)
        state[own + "attention_output.weight"] = weights.pop(file + "attn.W_O").flatten(0, 1).T
        state[own + "attention_output.bias"] = weights.pop(file + "attn.b_O")
        for index, name in (0, "in"), (2, "out"):
            state[f"{own}mlp.{index}.weight"] = weights.pop(f"{file}mlp.W_{name}").T
            state[f"{own}mlp.{index}.bias"] = weights.pop(f"{file}mlp.b_{name}")
    state |= weights  # what is left is reported as unexpected
    return {name: weight.float().contiguous() for name, weight in state.items()}
