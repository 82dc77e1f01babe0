"""Images a second from each kind of source, against a folder of the same images.

Run: ``python benchmarks/sources.py [--images 2000] [--rounds 3]``

The same JPEG files (480 x 360, drawn and noisy) are written as a folder, a zip, Parquet, a Hugging
Face data set, WebDataset shards plain and compressed, and into fsspec's memory; a server on this
machine serves them too. Each is read as `index` reads it (decode, hash, thumbnail, model),
with the bundled encoder, in rounds that take turns. The best round counts, and the least time of
the cores, which says more where others use the machine. The catalog's indexes, which do not depend
on the source, are left out. What it takes to look at the source first is included.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipbranches_widget.embed import embed_images
from clipbranches_widget.encoder import bundled_encoder
from clipbranches_widget.source_table import RowStream
from clipbranches_widget.sources import image_source

PER_SHARD = 500


def main() -> None:
    """Write, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    encoder = bundled_encoder("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = [jpeg(number) for number in range(options.images)]
        print(
            f"{len(images):,} JPEG files, {sum(map(len, images)) / len(images) / 1e3:.0f} KB each"
        )
        with served(folder / "photos") as address:
            sources = written(folder, images, address)
            seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in sources}
            for _ in range(options.rounds):
                for kind, source in sources.items():
                    seconds[kind].append(read(source(), encoder, len(images)))
    wall, core = (min(times) for times in zip(*seconds["folder"], strict=True))
    print("| source | images/s | against a folder | core ms an image | against a folder |")
    print("|---|---|---|---|---|")
    for kind, taken in seconds.items():
        own_wall, own_core = (min(times) for times in zip(*taken, strict=True))
        print(
            f"| {kind} | {len(images) / own_wall:,.0f} | {wall / own_wall:.2f} | "
            f"{1e3 * own_core / len(images):.2f} | {own_core / core:.2f} |"
        )


def jpeg(number: int) -> bytes:
    """Return a picture of soft colours and some noise."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (9, 12, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((480, 360), Image.Resampling.BICUBIC), float)
    noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def read(source: Any, encoder: Any, n_images: int) -> tuple[float, float]:
    """Return the seconds, of the clock and of the cores, that embedding a source takes."""
    start, core = time.perf_counter(), time.process_time()
    found = image_source(source)
    n_read = 0
    for batch in embed_images(RowStream(found), encoder, root=found.root):
        n_read += len(batch.positions)
    taken = time.perf_counter() - start, time.process_time() - core
    assert n_read == n_images
    return taken


def written(folder: Path, images: list[bytes], address: str) -> dict[str, Callable[[], Any]]:
    """Write the images in every form; returns what to give to `index`."""
    photos = folder / "photos"
    photos.mkdir()
    for number, data in enumerate(images):
        (photos / f"{number:06d}.jpg").write_bytes(data)
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for number, data in enumerate(images):
            archive.writestr(f"{number:06d}.jpg", data)
    pq.write_table(pa.table({"image": images}), folder / "photos.parquet", row_group_size=100)
    features = datasets.Features({"image": datasets.Image()})
    columns = {"image": [{"bytes": data, "path": None} for data in images]}
    saved = datasets.Dataset.from_dict(columns, features=features)
    saved.save_to_disk(folder / "saved")
    for ending, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        for shard in range(0, len(images), PER_SHARD):
            write_tar(
                folder / f"{shard:06d}.{ending}", mode, shard, images[shard : shard + PER_SHARD]
            )
    memory = fsspec.filesystem("memory")
    for number, data in enumerate(images):
        memory.pipe(f"/bench/{number:06d}.jpg", data)
    for shard in range(0, len(images), PER_SHARD):
        memory.pipe(f"/tars/{shard:06d}.tar", (folder / f"{shard:06d}.tar").read_bytes())
    urls = [f"{address}/{number:06d}.jpg" for number in range(len(images))]
    return {
        "folder": lambda: photos,
        "zip": lambda: folder / "photos.zip",
        "Parquet": lambda: folder / "photos.parquet",
        "Hugging Face, saved": lambda: folder / "saved",
        "Hugging Face, object": lambda: datasets.load_from_disk(folder / "saved"),
        "WebDataset .tar": lambda: f"{folder}/*.tar",
        "WebDataset .tar.gz": lambda: f"{folder}/*.tar.gz",
        "memory:// folder": lambda: "memory://bench",
        "memory:// .tar": lambda: "memory://tars",
        "http://127.0.0.1": lambda: urls,
    }


def write_tar(path: Path, mode: str, first: int, images: list[bytes]) -> None:
    """Write one shard: an image, a caption and a JSON object a sample."""
    with tarfile.open(path, mode) as tar:
        for number, data in enumerate(images, first):
            for ending, content in (("jpg", data), ("txt", b"a picture"), ("json", b'{"n": 1}')):
                info = tarfile.TarInfo(f"{number:06d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


class served:  # noqa: N801 - reads as a verb
    """Serve a folder at a port of this machine."""

    def __init__(self, folder: Path) -> None:
        handler = functools.partial(Quiet, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves without a log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as its base
        """Say nothing."""


if __name__ == "__main__":
    main()
