"""Find and identify weights: of open_clip models, failing fast offline, and ours (layer 1).

open_clip and huggingface_hub retry an unreachable hub for 23 seconds per file and name. Here the
cache is looked at first; a file that must be downloaded is asked for only after the hub has
answered one request.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from clipbranches_widget.errors import EncoderError, WeightsUnavailableError

BUNDLED_MODEL = "clipbranches-demo"
"""Name of the small model in this package."""

BUNDLED_FOLDER = Path(__file__).parent / "demo_encoder"
DEMO_NOTE = "demo model for icons, not for photographs"

HUB_TIMEOUT_S = 5.0
CONFIG_FILE = "open_clip_config.json"
_HASHED_VALUES = 4096


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights on this machine.

    Attributes
    ----------
    path
        The file.
    pretrained
        What to record: the tag as given, or the absolute path of a local checkpoint.
    preprocess
        Preprocessing the tag asks for, for open_clip's ``force_preprocess_cfg``; empty for a file.
    quick_gelu
        Whether the weights were trained with QuickGELU. open_clip only warns when its config
        says otherwise, and the embeddings are then silently worse.
    """

    path: Path
    pretrained: str
    preprocess: dict[str, Any]
    quick_gelu: bool


def find_checkpoint(
    open_clip: ModuleType, model: str, pretrained: str | None, cache_dir: Path | None
) -> Checkpoint:
    """Return the weights of a registry model: a tag's, downloaded if need be, or a local file.

    Raises
    ------
    EncoderError
        open_clip does not know the model or the tag, or no tag was given.
    WeightsUnavailableError
        See `hub_file`.
    """
    name = model.replace("/", "-")
    if name not in open_clip.list_models():
        raise EncoderError(
            f"expected a model open_clip knows, got {model!r}"
            f"{_close(model, open_clip.list_models())}; "
            "open_clip.list_pretrained() lists every (model, pretrained) pair"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not pretrained:
        raise EncoderError(
            f"expected pretrained weights for {model!r}, got none; pass a tag "
            f"({', '.join(tags[:6]) or 'this model has none'}) or the path of a checkpoint"
        )
    config: dict[str, Any] = open_clip.get_pretrained_cfg(name, pretrained)
    if config:
        return Checkpoint(
            path=_tag_file(open_clip, config, cache_dir),
            pretrained=pretrained,
            preprocess={
                key: config[key]
                for key in ("size", "mean", "std", "interpolation", "resize_mode")
                if config.get(key) is not None
            },
            quick_gelu=bool(config.get("quick_gelu", False)),
        )
    path = Path(pretrained).expanduser()
    if path.is_file():
        return Checkpoint(path, str(path.resolve()), preprocess={}, quick_gelu=False)
    if path.suffix or os.sep in pretrained:
        raise EncoderError(
            f"expected a checkpoint file for {model!r}, got {pretrained!r}, where there is no file"
        )
    raise EncoderError(
        f"expected a pretrained tag of {model!r}, got {pretrained!r}{_close(pretrained, tags)}; "
        f"it has {', '.join(tags) or 'no tags: pass the path of a checkpoint'}. "
        "open_clip.list_pretrained() lists every (model, pretrained) pair"
    )


def require_repository(model: str, cache_dir: Path | None) -> None:
    """Check that the parts of an ``hf-hub:`` or ``local-dir:`` model are there, downloading them.

    Raises
    ------
    EncoderError
        The folder is not one of open_clip's.
    WeightsUnavailableError
        See `hub_file`.
    """
    scheme, _, place = model.partition(":")
    if scheme == "hf-hub":
        config = json.loads(hub_file(place, [CONFIG_FILE], cache_dir).read_text("utf-8"))
        require_tokenizer(config.get("model_cfg", {}), cache_dir)
        hub_file(place, ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], cache_dir)
    elif not (Path(place) / CONFIG_FILE).is_file():
        raise EncoderError(f"expected a folder with {CONFIG_FILE} and weights, got {place!r}")


def require_tokenizer(config: dict[str, Any], cache_dir: Path | None) -> None:
    """Check that a tokenizer kept on the hub is there, where a model's config names one.

    Raises
    ------
    WeightsUnavailableError
        See `hub_file`.
    """
    repository = config.get("text_cfg", {}).get("hf_tokenizer_name")
    if repository and not Path(repository).is_dir():
        hub_file(repository, ["tokenizer_config.json"], cache_dir)


def hub_file(repository: str, names: Sequence[str], cache_dir: Path | None) -> Path:
    """Return the first of `names` in a hub repository: from the cache, else downloaded.

    Raises
    ------
    WeightsUnavailableError
        Not in the cache, and the hub cannot be reached (known after `HUB_TIMEOUT_S` at most),
        refuses, or has none of them.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, cache_dir=cache_dir)
        if isinstance(cached, str):
            return Path(cached)
    what = f"{names[-1]} of {repository}"
    if constants.HF_HUB_OFFLINE:
        raise _unavailable(what, "it is not in the cache and HF_HUB_OFFLINE is set", cache_dir)
    silence = _no_answer(constants.ENDPOINT)
    if silence is not None:
        raise _unavailable(what, f"{constants.ENDPOINT} cannot be reached ({silence})", cache_dir)
    # Its bases hold the HTTP client's own error, whichever client the installed hub uses.
    refusals: Any = (*errors.HfHubHTTPError.__bases__, OSError, ValueError)
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, cache_dir=cache_dir))
        except errors.LocalEntryNotFoundError as error:  # refused, or the network went away
            raise _unavailable(what, _first_line(error.__cause__ or error), cache_dir) from error
        except errors.EntryNotFoundError:
            continue
        except refusals as error:
            raise _unavailable(what, _first_line(error), cache_dir) from error
    raise _unavailable(what, "the repository has no such file", cache_dir)


def bundled_file(name: str) -> Path:
    """Return a file of the bundled model.

    Raises
    ------
    WeightsUnavailableError
        The package was installed without it.
    """
    path = BUNDLED_FOLDER / name
    if not path.is_file():
        raise WeightsUnavailableError(
            f"expected the bundled encoder's {path.name} in {path.parent}, got no such file; "
            "install clipbranches_widget from its wheel again"
        )
    return path


def bundled_weights_hash() -> str:
    """Return the hash of the bundled model without loading it or importing torch (30 ms)."""
    digest = blake2b(digest_size=16)
    for name in (f"{BUNDLED_MODEL}.json", "weights.safetensors"):
        digest.update(bundled_file(name).read_bytes())
    return digest.hexdigest()


def state_hash(net: Any) -> str:
    """Return a hash of a model's parameters; see `EncoderInfo.weights_hash`."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(net.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _HASHED_VALUES)].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.astype("<f4").tobytes())
    return digest.hexdigest()


def _tag_file(open_clip: ModuleType, config: dict[str, Any], cache_dir: Path | None) -> Path:
    """Return the weights file of a tag, named as ``org/repo/file`` or ``org/repo/``."""
    repository, name = os.path.split(config.get("hf_hub") or "")
    if repository:
        name = name or "open_clip_pytorch_model.bin"
        safe = f"{Path(name).stem}.safetensors".replace(
            "open_clip_pytorch_model", "open_clip_model"
        )
        return hub_file(repository, list(dict.fromkeys([safe, name])), cache_dir)
    try:  # a plain address: open_clip checks the file's hash
        return Path(open_clip.download_pretrained(config, cache_dir=cache_dir))
    except (OSError, RuntimeError) as error:
        raise _unavailable(str(config.get("url")), _first_line(error), cache_dir) from error


def _no_answer(endpoint: str) -> str | None:
    """Return why a server does not answer, None when it does (with whatever status)."""
    if not endpoint.startswith(("http://", "https://")):
        return "not an http address"
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_S).close()  # noqa: S310
    except HTTPError:
        return None
    except URLError as error:
        # Python builds without root certificates fail here where the hub's client does not.
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except OSError as error:
        return _first_line(error)
    return None


def _unavailable(what: str, why: str, cache_dir: Path | None) -> WeightsUnavailableError:
    from huggingface_hub import constants

    return WeightsUnavailableError(
        f"expected to download {what}, got no weights: {why}. Without a network, choose one: "
        "pass the path of a local checkpoint as pretrained=; copy the folder "
        f"{cache_dir or constants.HF_HUB_CACHE} from a machine that has the model and set "
        "HF_HUB_OFFLINE=1; or use the bundled demo encoder, index(..., model='bundled') or "
        "bundled_encoder() (for icons, not for photographs)"
    )


def _close(name: str, known: Sequence[str]) -> str:
    """Return the close matches of a name as a clause, empty when there are none."""
    lower = {candidate.lower(): candidate for candidate in known}
    matches = [lower[match] for match in get_close_matches(name.lower(), lower, n=5, cutoff=0.5)]
    return f" (close: {', '.join(matches)})" if matches else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
