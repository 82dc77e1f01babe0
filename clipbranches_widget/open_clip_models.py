"""Build open_clip models: registry names, checkpoints, folders, repositories, ours (layer 1).

The only module that asks open_clip to build anything; it leaves torch's settings, warning filters
and logging as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from clipbranches_widget.errors import EncoderError
from clipbranches_widget.weights import (
    BUNDLED_MODEL,
    bundled_file,
    find_checkpoint,
    require_repository,
    require_tokenizer,
)

_REGISTRY_LOCK = Lock()
_THREADS_LOCK = Lock()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for inference.

    Attributes
    ----------
    net
        The open_clip model, on its device, in evaluation mode.
    tokenizer
        Texts to token ids.
    image_steps
        open_clip's transform as far as it works on PIL images.
    mean, std
        Of 8-bit pixel values, shape (1, 3, 1, 1), on the device.
    image_size
        Side of the input in pixels.
    pretrained
        What to record: tag, absolute path, or empty.
    """

    net: Any
    tokenizer: Any
    image_steps: list[Any]
    mean: Any
    std: Any
    image_size: int
    pretrained: str


def load_model(
    model: str, pretrained: str | None, device: Any, cache_dir: Path | None
) -> LoadedModel:
    """Build a model and its tokenizer with open_clip; all its weights must load.

    Raises
    ------
    EncoderError, WeightsUnavailableError
        See `encoder.OpenClipEncoder`.
    """
    with _open_clip() as open_clip:
        recorded, weights = "", None
        cache = None if cache_dir is None else str(cache_dir)
        options: dict[str, Any] = {"require_pretrained": True, "cache_dir": cache}
        if model == BUNDLED_MODEL or model.startswith(("hf-hub:", "local-dir:")):
            if pretrained:
                raise EncoderError(
                    f"expected pretrained=None for {model!r}, which brings its own weights, "
                    f"got {pretrained!r}"
                )
            if model == BUNDLED_MODEL:
                weights = _register_bundled(open_clip)
            else:
                require_repository(model, cache_dir)
        else:
            checkpoint = find_checkpoint(open_clip, model, pretrained, cache_dir)
            recorded, weights = checkpoint.pretrained, str(checkpoint.path)
            options["force_preprocess_cfg"] = checkpoint.preprocess
            options["force_quick_gelu"] = checkpoint.quick_gelu
            require_tokenizer(open_clip.get_model_config(model.replace("/", "-")), cache_dir)
        try:
            net = open_clip.create_model(model, pretrained=weights, **options)
            tokenizer = open_clip.get_tokenizer(model, cache_dir=cache)
        except _load_errors() as error:
            first_lines = " ".join(str(error).split())[:400]
            raise EncoderError(
                f"expected the weights of {model!r} in {weights or 'its repository'}, got: "
                f"{type(error).__name__}: {first_lines}; check that model and checkpoint belong "
                "together and that the file is whole"
            ) from error
    steps, mean, std = _input_parts(net)
    size = net.visual.image_size
    return LoadedModel(
        net=net.to(device).eval(),
        tokenizer=tokenizer,
        image_steps=steps,
        mean=mean.to(device),
        std=std.to(device),
        image_size=int(max(size) if isinstance(size, tuple | list) else size),
        pretrained=recorded,
    )


def _load_errors() -> tuple[type[Exception], ...]:
    """Return what open_clip, torch and safetensors raise on unfit or damaged checkpoints."""
    from pickle import UnpicklingError  # of torch.load(weights_only=True)

    from safetensors import SafetensorError

    misfits = (AssertionError, AttributeError, LookupError, TypeError, ValueError)
    return (*misfits, EOFError, OSError, RuntimeError, SafetensorError, UnpicklingError)


@contextmanager
def _open_clip() -> Iterator[Any]:
    """Import open_clip, and keep it from configuring the process's logging.

    It logs through `logging.info`, which installs a root handler where there is none:
    afterwards every library's warnings would appear in the user's notebook.
    """
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        import open_clip

        yield open_clip
    finally:
        root.removeHandler(silent)


def _register_bundled(open_clip: Any) -> str:
    """Tell open_clip about the bundled model once; return the path of its weights."""
    config = bundled_file(f"{BUNDLED_MODEL}.json")
    with _REGISTRY_LOCK:
        if BUNDLED_MODEL not in open_clip.list_models():
            open_clip.add_model_config(config)
    return str(bundled_file("weights.safetensors"))


def _input_parts(net: Any) -> tuple[list[Any], Any, Any]:
    """Return a model's steps on PIL images, then mean and spread of the 8-bit values after them.

    open_clip's own transform, taken apart: the arithmetic is done on whole batches on the model's
    device. One image at a time in decoder threads it cost more than decoding, as each thread
    starts a pool of torch's threads, and kept four times the memory waiting.
    """
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(**net.visual.preprocess_cfg), is_train=False)
    *steps, _to_tensor, normalize = transform.transforms
    mean, std = (
        255 * torch.as_tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
        for values in (normalize.mean, normalize.std)
    )
    return steps, mean, std


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on the calling thread alone, and put its number of threads back after.

    For models so small that their layers take microseconds: waiting for the other threads after
    each one costs little on an idle machine and nearly everything on a busy one or under a CPU
    quota (a text query of the bundled model: 11 ms against 470 ms, load 3 per core).
    """
    import torch

    # torch keeps the number per thread, but a thread new to torch starts with the number last set
    # anywhere: under the lock that cannot be the 1 of another caller, to be "put back" for good.
    with _THREADS_LOCK:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(n_threads)


def pick_device(name: str | None) -> Any:
    """Return a torch device that exists; the best one for None."""
    import torch

    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name is None:
        name = next(kind for kind, there in has.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EncoderError(f"expected a torch device such as 'cpu', got {name!r}") from error
    n_cuda = torch.cuda.device_count()
    if not has.get(device.type, True) or (device.type == "cuda" and (device.index or 0) >= n_cuda):
        there = ", ".join(kind for kind, present in has.items() if present)
        raise EncoderError(f"expected a device of this machine ({there}), got {name!r}")
    return device
