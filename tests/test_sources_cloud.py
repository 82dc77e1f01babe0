"""Sources in object stores: an S3 server (moto) and a Google Cloud Storage one run here."""

import io
import tarfile

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_images import assert_holds, build, pictures

import clipbranches_widget as cb
from clipbranches_widget.errors import CatalogError

pytest.importorskip("moto", reason='pip install "moto[s3,server]" s3fs')
pytest.importorskip("gcp_storage_emulator", reason="pip install gcp-storage-emulator gcsfs")
N_IMAGES = 12


@pytest.fixture(scope="module")
def images():
    return pictures(N_IMAGES)


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def s3(environment):
    """Yield a bucket's URL on an S3 server, set up as users do: by environment variables."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        environment.setenv(name, "testing")
    environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").mkdir("photos")
    yield "s3://photos"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def gs(environment):
    """Yield a bucket's URL on a Google Cloud Storage server."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="photos")
    server.start()
    port = server._api._httpd.server_port
    environment.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield "gs://photos"
    fsspec.filesystem("gs").clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request, images):
    """Yield the URL of a bucket with pictures in a tree, an archive, a table and embeddings."""
    url = request.getfixturevalue(request.param)
    store = fsspec.filesystem(request.param)
    for number, data in enumerate(images):
        store.pipe(f"{url}/tree/{'abc'[number % 3]}/red panda_{number:02d}.png", data)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for number, data in enumerate(images):
            entry = tarfile.TarInfo(f"{number:04d}.png")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    store.pipe(f"{url}/tars/0000.tar", archive.getvalue())
    table = io.BytesIO()
    pq.write_table(pa.table({"image": images, "caption": [f"c{n}" for n in range(12)]}), table)
    store.pipe(f"{url}/table.parquet", table.getvalue())
    array = io.BytesIO()
    np.save(array, np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32))
    store.pipe(f"{url}/vectors.npy", array.getvalue())
    return url


def in_order(images):
    return [images[n] for part in range(3) for n in range(part, N_IMAGES, 3)]


def test_a_tree(bucket, tmp_path, images):
    catalog = build(f"{bucket}/tree", tmp_path / "a.cbcat")
    assert_holds(catalog, in_order(images))
    assert catalog.uri(0) == f"{bucket}/tree/a/red panda_00.png"


def test_tars_and_tables(bucket, tmp_path, images):
    assert_holds(build(f"{bucket}/tars/{{0000..0000}}.tar", tmp_path / "t.cbcat"), images)
    catalog = build(f"{bucket}/table.parquet", tmp_path / "p.cbcat")
    assert_holds(catalog, images)
    assert catalog.caption(3) == "c3"


def test_a_table_of_urls_with_one_that_is_gone(bucket, tmp_path, images):
    names = [f"{bucket}/tree/{'abc'[n % 3]}/red panda_{n:02d}.png" for n in range(12)]
    catalog = build(pd.DataFrame({"uri": [*names, f"{bucket}/gone.png"]}), tmp_path / "a.cbcat")
    assert_holds(catalog, images)
    assert catalog.skipped.column("uri").to_pylist() == [f"{bucket}/gone.png"]


def test_embeddings(bucket, tmp_path):
    catalog = cb.from_embeddings(f"{bucket}/vectors.npy", tmp_path / "a.cbcat")
    assert (len(catalog), catalog.dim) == (12, 5)


def test_a_bucket_that_is_not_there(bucket, tmp_path):
    with pytest.raises(CatalogError, match="nowhere"):
        build(bucket.replace("photos", "nowhere"), tmp_path / "a.cbcat")
