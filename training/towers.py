"""The model's shape, its text forward pass on short batches, and its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODEL_NAME = "clipbranches-demo"
CONFIG: dict[str, Any] = {
    "embed_dim": 384,
    "vision_cfg": {
        "image_size": 64,
        "timm_model_name": "regnetx_002",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 160,
        "heads": 5,
        "layers": 4,
    },
}
# open_clip's default preprocessing, so that the plain route needs no extra settings.
MEAN = open_clip.OPENAI_DATASET_MEAN
STD = open_clip.OPENAI_DATASET_STD


def build_model(seed: int = 0) -> Any:
    """Return the untrained ``open_clip.CLIP`` of `CONFIG` (Any: open_clip is not typed)."""
    torch.manual_seed(seed)
    return open_clip.CLIP(**CONFIG)


def tokenize(texts: list[str]) -> Tensor:
    """Return token ids, shape (len(texts), 32), padded with zeros, as the shipped tokenizer."""
    length = CONFIG["text_cfg"]["context_length"]
    tokens: Tensor = open_clip.SimpleTokenizer(context_length=length)(texts)
    return tokens


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Return text features, shape (n, 384), not normalised.

    Equal to ``model.encode_text`` but computes only as many positions as the longest text has:
    the causal mask makes the padding after it irrelevant.
    """
    ends = tokens.argmax(dim=-1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(x), device=x.device), ends]
    features: Tensor = x @ model.text_projection
    return features


def normalise_pixels(pixels: Tensor) -> Tensor:
    """Turn values in [0, 1], shape (n, 3, 64, 64), into the image tower's input."""
    mean = torch.tensor(MEAN, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(1, 3, 1, 1)
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


class Averaged:
    """Exponential moving average of a module's weights: what is saved and shipped."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._n_updates = 0
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present weights."""
        self._n_updates += 1
        # Young averages follow faster, so that the initial weights do not linger.
        decay = min(self._decay, self._n_updates / (self._n_updates + 10))
        for key, value in module.state_dict().items():
            if value.dtype.is_floating_point:
                self.state[key].lerp_(value, 1 - decay)
            else:
                self.state[key].copy_(value)

    def save(self, path: Path) -> None:
        """Write the averaged weights atomically."""
        save_state(self.state, path)


def save_state(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors: to a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, partial)
    partial.chmod(0o644)  # save_file makes it private
    partial.replace(path)


def load_towers(model: Any, text: Path, image: Path) -> None:
    """Load the two separately trained towers into one model."""
    visual = {k: v for k, v in load_file(image).items() if k.startswith("visual.")}
    rest = {k: v for k, v in load_file(text).items() if not k.startswith("visual.")}
    model.load_state_dict({**rest, **visual})


def export(model_state: dict[str, Tensor], folder: Path) -> None:
    """Write config and half-precision weights where the package finds them.

    open_clip registers a config under its file's name.
    """
    half = {k: v.half() if v.dtype.is_floating_point else v for k, v in model_state.items()}
    save_state(half, folder / "weights.safetensors")
    text = json.dumps(CONFIG, indent=2) + "\n"
    (folder / f"{MODEL_NAME}.json").write_text(text, encoding="utf-8")
