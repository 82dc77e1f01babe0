import dataclasses
import json
import logging
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from clipbranches_widget.encoder import (
    EncoderInfo,
    OpenClipEncoder,
    bundled_encoder,
    load_encoder,
)
from clipbranches_widget.errors import EncoderError, QueryError, WeightsUnavailableError
from clipbranches_widget.images import resolve
from clipbranches_widget.weights import BUNDLED_MODEL, DEMO_NOTE, bundled_weights_hash

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a folder with a tiny random CLIP, which open_clip knows as tiny-test."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny")
    config = folder / "tiny-test.json"
    config.write_text(json.dumps(TINY))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    open_clip.add_model_config(config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_file(open_clip.CLIP(**TINY).state_dict(), folder / "tiny.safetensors")
    return folder


@pytest.fixture(scope="module")
def encoder(tiny):
    return OpenClipEncoder("tiny-test", tiny / "tiny.safetensors", device="cpu")


@pytest.fixture(scope="module")
def bundled():
    return bundled_encoder("cpu")


def pictures(rng, n):
    return [Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)) for _ in range(n)]


def test_importing_the_module_imports_neither_torch_nor_open_clip():
    code = (
        "import sys, clipbranches_widget.encoder as e; e.bundled_weights_hash(); "
        "sys.exit('torch' in sys.modules or 'open_clip' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_vectors_are_unit_float32_of_the_stated_shape(encoder, rng):
    for vectors in (encoder.encode_text(["a", "b c"]), encoder.encode_images(pictures(rng, 2))):
        assert (vectors.shape, vectors.dtype) == ((2, 24), np.float32)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert encoder.encode_text([]).shape == encoder.encode_images([]).shape == (0, 24)
    assert (encoder.dim, encoder.image_size, encoder.has_text) == (24, 32, True)


def test_vectors_are_those_of_open_clip(encoder, tiny, rng):
    import open_clip
    import torch

    net, _, transform = open_clip.create_model_and_transforms(
        "tiny-test", pretrained=str(tiny / "tiny.safetensors")
    )
    image = pictures(rng, 1)[0]
    with torch.inference_mode():
        tokens = open_clip.get_tokenizer("tiny-test")(["a red bird"])
        text = net.eval().encode_text(tokens, normalize=True).numpy()
        vision = net.encode_image(transform(image)[None], normalize=True).numpy()
    assert np.allclose(encoder.encode_text(["a red bird"]), text, atol=1e-6)
    assert np.allclose(encoder.encode_images([image]), vision, atol=1e-6)


def test_batches_do_not_change_vectors(encoder):
    texts = [f"text number {number}" for number in range(300)]
    together = encoder.encode_text(texts)
    alone = np.concatenate([encoder.encode_text([texts[i]]) for i in (0, 255, 256, 299)])
    assert np.allclose(together[[0, 255, 256, 299]], alone, atol=1e-5)


def test_over_long_text_is_cut(encoder):
    words = "one two three four five six seven eight nine ten"
    assert np.allclose(encoder.encode_text([words]), encoder.encode_text([words + " and more"]))


@pytest.mark.parametrize("texts", [[""], ["a", " \n\t"]])
def test_empty_text_is_refused(encoder, texts):
    with pytest.raises(QueryError, match="got an empty one"):
        encoder.encode_text(texts)


def test_one_string_is_not_a_list_of_letters(encoder):
    with pytest.raises(QueryError, match=r"pass \[text\]"):
        encoder.encode_text("bird")


def test_a_long_strip_is_its_middle(encoder):
    strip = Image.new("RGB", (30_000, 2), "white")
    strip.paste("red", (14_000, 0, 16_000, 2))
    red = encoder.encode_images([Image.new("RGB", (32, 32), "red")])
    assert np.allclose(encoder.encode_images([strip]), red, atol=1e-4)
    tall = strip.transpose(Image.Transpose.ROTATE_90)
    assert np.allclose(encoder.encode_images([tall]), red, atol=1e-4)


def test_threads_agree(encoder):
    texts = [f"a picture of {number}" for number in range(40)]
    expected = encoder.encode_text(texts)
    wrong = []

    def work():
        for text, vector in zip(texts, expected, strict=True):
            if not np.allclose(encoder.encode_text([text])[0], vector, atol=1e-5):
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_loading_leaves_the_process_as_it_was(tiny):
    import torch

    def state():
        return (
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            list(warnings.filters),
            list(logging.getLogger().handlers),
        )

    before = state()
    OpenClipEncoder("tiny-test", tiny / "tiny.safetensors").encode_text(["a"])
    assert state() == before


def test_a_folder_of_open_clip_is_the_same_model(encoder, tiny):
    same = OpenClipEncoder(f"local-dir:{tiny}", None, device="cpu")
    assert same.info.weights_hash == encoder.info.weights_hash
    assert np.allclose(same.encode_text(["a"]), encoder.encode_text(["a"]))


def test_weights_hash_knows_weights_not_files(encoder, tiny):
    import torch
    from safetensors.torch import load_file

    state = load_file(tiny / "tiny.safetensors")
    torch.save(state, tiny / "same.pt")
    assert OpenClipEncoder("tiny-test", tiny / "same.pt").info.weights_hash == (
        encoder.info.weights_hash
    )
    state["visual.proj"] += 0.01
    torch.save(state, tiny / "other.pt")
    assert OpenClipEncoder("tiny-test", tiny / "other.pt").info.weights_hash != (
        encoder.info.weights_hash
    )


def test_load_encoder_restores_and_refuses_other_weights(encoder, tiny):
    import shutil

    assert encoder.info.pretrained == str((tiny / "tiny.safetensors").resolve())
    assert load_encoder(encoder.info, device="cpu").info == encoder.info
    moved = tiny / "moved.safetensors"
    shutil.copy(tiny / "tiny.safetensors", moved)
    info = OpenClipEncoder("tiny-test", moved).info
    test_weights_hash_knows_weights_not_files(encoder, tiny)
    shutil.copy(tiny / "other.pt", moved.with_suffix(".pt"))
    changed = dataclasses.replace(info, pretrained=str(moved.with_suffix(".pt")))
    with pytest.raises(EncoderError, match=r"weights changed since.*or index the images again"):
        load_encoder(changed)
    moved.unlink()
    with pytest.raises(EncoderError, match="there is no file"):
        load_encoder(info)


def test_a_catalog_without_encoder_says_so():
    with pytest.raises(EncoderError, match="made from embeddings alone"):
        load_encoder(EncoderInfo("none", "", "", 8, ""))
    assert str(EncoderInfo("none", "", "", 8, "")) == "no encoder (8-d embeddings)"


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-33", "openai", r"got 'ViT-B-33' \(close: .*ViT-B-32.*list_pretrained\(\)"),
        ("ViT-B-32", "laion2b_s34b", r"\(close: laion2b_s34b_b79k.*list_pretrained\(\)"),
        ("ViT-B-32", None, r"expected pretrained weights .*pass a tag \(openai"),
        ("ViT-B-32", "/no/where.pt", "there is no file"),
        (BUNDLED_MODEL, "openai", "expected pretrained=None"),
        ("local-dir:/no/where", None, "expected a folder with open_clip_config.json"),
        ("hf-hub:a/b", "openai", "expected pretrained=None"),
    ],
)
def test_unknown_names_say_what_there_is(model, pretrained, message):
    with pytest.raises(EncoderError, match=message):
        OpenClipEncoder(model, pretrained)


def test_checkpoints_that_do_not_fit_are_refused(tiny, tmp_path):
    weights = tiny / "tiny.safetensors"
    with pytest.raises(EncoderError, match="model and checkpoint belong together"):
        OpenClipEncoder("ViT-S-32", weights)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EncoderError, match="the file is whole"):
        OpenClipEncoder("tiny-test", cut)
    text = tmp_path / "text.pt"
    text.write_text("no weights")
    with pytest.raises(EncoderError, match="the file is whole"):
        OpenClipEncoder("tiny-test", text)


def test_damaged_weights_are_found_at_once(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(tiny / "tiny.safetensors")
    state["text_projection"][:] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(EncoderError, match="expected finite embeddings"):
        OpenClipEncoder("tiny-test", tmp_path / "nan.safetensors")


@pytest.mark.parametrize("device", ["cuda:99", "quantum"])
def test_devices_that_are_not_there_are_refused(tiny, device):
    with pytest.raises(EncoderError, match="expected a"):
        OpenClipEncoder("tiny-test", tiny / "tiny.safetensors", device=device)


@pytest.mark.parametrize(
    ("model", "pretrained"),
    [
        ("ViT-B-32", "laion2b_s34b_b79k"),
        ("ViT-B-32", "openai"),
        ("ViT-B-16-SigLIP", "webli"),
        ("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", None),
    ],
)
def test_without_a_hub_the_choices_are_named_within_seconds(
    monkeypatch, tmp_path, model, pretrained
):
    from huggingface_hub import constants

    # An address nobody answers: true without a network too, and the same on every machine.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(WeightsUnavailableError, match="cannot be reached") as caught:
        OpenClipEncoder(model, pretrained, cache_dir=tmp_path)
    assert time.monotonic() - start < 20  # an attempt through open_clip alone takes 46 s
    for choice in ("local checkpoint", "HF_HUB_OFFLINE=1", str(tmp_path), "bundled demo encoder"):
        assert choice in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [(404, "EntryNotFound", "has no such file"), (404, "RepoNotFound", "404"), (403, "No", "403")],
)
def test_a_hub_that_refuses_is_quoted(monkeypatch, tmp_path, status, code, reason):
    """A local HTTP server plays a hub that can be reached and says no."""
    from huggingface_hub import constants

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if self.path == "/" else status)
            self.send_header("X-Error-Code", code)
            self.end_headers()

        def log_message(self, *_):
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(WeightsUnavailableError, match=f"got no weights: .*{reason}"):
            OpenClipEncoder("ViT-B-32", "openai", cache_dir=tmp_path)
        server.shutdown()


def test_offline_mode_asks_nobody(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailableError, match="HF_HUB_OFFLINE is set"):
        OpenClipEncoder("ViT-B-32", "openai", cache_dir=tmp_path)


def test_cached_hub_files_need_no_network(monkeypatch, tiny, tmp_path, encoder):
    """A repository in the cache's own layout loads with the hub switched off."""
    import shutil

    from huggingface_hub import constants

    repository = tmp_path / "models--me--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copy(tiny / "tiny.safetensors", snapshot / "open_clip_model.safetensors")
    config = {"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (snapshot / "open_clip_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = OpenClipEncoder("hf-hub:me/tiny", None, cache_dir=tmp_path)
    assert found.info.weights_hash == encoder.info.weights_hash
    assert found.info.pretrained == ""


def test_bundled_encoder_names_itself_a_demo(bundled):
    assert bundled.info.kind == "bundled"
    assert bundled.info.weights_hash == bundled_weights_hash()
    assert DEMO_NOTE == "demo model for icons, not for photographs"
    assert DEMO_NOTE in repr(bundled)
    assert DEMO_NOTE in str(bundled.info)
    assert load_encoder(bundled.info, device="cpu").info == bundled.info


def test_a_catalog_of_an_older_bundled_model_is_refused(bundled):
    with pytest.raises(EncoderError, match=r"another version of clipbranches_widget; build it"):
        load_encoder(dataclasses.replace(bundled.info, weights_hash="0" * 32))


def test_bundled_encoder_knows_its_icons(bundled):
    names = {"1F98B": "butterfly", "1F697": "car", "1F34C": "banana", "1F3B8": "guitar"}
    images = bundled.encode_images([resolve(f"openmoji:{code}") for code in names])
    texts = bundled.encode_text(list(names.values()))
    assert (images @ texts.T).argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_bundled_encoder_puts_torchs_threads_back(bundled, rng):
    import torch

    seen = []

    def work():
        for _ in range(20):
            bundled.encode_text(["bird"])
            bundled.encode_images(pictures(rng, 1))
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        work()
    finally:
        torch.set_num_threads(before)
    assert seen == [3] * 5


def test_bundled_encoder_loads_in_several_threads_at_once():
    loaded = []
    threads = [
        threading.Thread(target=lambda: loaded.append(bundled_encoder("cpu"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    vectors = [encoder.encode_text(["bird"]) for encoder in loaded]
    assert len(vectors) == 3
    assert np.allclose(vectors[0], vectors[1])
    assert np.allclose(vectors[0], vectors[2])
