"""Nodes read their files from HDFS, and write models to it: with a real NameNode and DataNode.

SPARKTF_HDFS_JARS is a directory with Hadoop's jars, servers and all, of which pyspark 2.4.8 has those of Hadoop 2.7.3
(``deps/jars`` in its source distribution).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

pytestmark = pytest.mark.long

EXAMPLE = Path(__file__).parents[2] / "examples" / "read_files.py"
JARS = "SPARKTF_HDFS_JARS"
SERVERS = "org.apache.hadoop.hdfs.server"
# Where the servers listen, beside the port that clients use.
PORTS = ("dfs.namenode.http-address", "dfs.datanode.address", "dfs.datanode.http.address", "dfs.datanode.ipc.address")
UP_SECONDS = 60.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run HDFS; yield the URI of its root."""
    pytest.importorskip("hdfs_native", reason="no HDFS client: pip install hdfs-native")
    if JARS not in os.environ:
        pytest.skip(f"no HDFS server: {JARS} names no directory with Hadoop's jars")
    java = shutil.which("java")
    if java is None:
        pytest.skip("no java command")
    directory = tmp_path_factory.mktemp("hdfs")
    port, *ports = free_ports(1 + len(PORTS))
    base = java_command(java, directory)
    options = settings(directory, port, ports)
    log = directory / "log"
    with log.open("ab") as output, contextlib.ExitStack() as servers:

        def command(server: str, *arguments: str) -> list[str]:
            return [*base, f"{SERVERS}.{server}", *options, *arguments]

        name_node = command("namenode.NameNode")
        subprocess.run([*name_node, "-format", "-nonInteractive"], stdout=output, stderr=output, timeout=60, check=True)
        for server in (name_node, command("datanode.DataNode")):
            process = subprocess.Popen(server, stdout=output, stderr=output)
            servers.callback(process.wait, 30)
            servers.callback(process.kill)
        wait_for_port(port, log)
        found = f"hdfs://127.0.0.1:{port}"
        wait_for_data_node(found, log)
        yield found


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def java_command(java: str, directory: Path) -> list[str]:
    """Return what starts a class of Hadoop's on Java 17."""
    for web in ("hdfs", "datanode"):
        # The servers show a website, of which Spark's jars have nothing.
        about = directory / "webapps" / web / "WEB-INF"
        about.mkdir(parents=True)
        (about / "web.xml").write_text("<web-app/>")
    (directory / "log4j.properties").write_text(
        "log4j.rootLogger=WARN, out\nlog4j.appender.out=org.apache.log4j.ConsoleAppender\n"
        "log4j.appender.out.layout=org.apache.log4j.SimpleLayout\n"
    )
    opened = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in ("java.lang", "java.nio")]
    return [java, "-Xmx256m", *opened, "-cp", os.pathsep.join([str(directory), f"{os.environ[JARS]}/*"])]


def settings(directory: Path, port: int, ports: list[int]) -> list[str]:
    """Return the servers' options: one copy of everything, only on loopback."""
    values = {
        "fs.defaultFS": f"hdfs://127.0.0.1:{port}",
        "dfs.replication": "1",
        "dfs.webhdfs.enabled": "false",
        "dfs.namenode.name.dir": (directory / "name").as_uri(),
        "dfs.datanode.data.dir": (directory / "data").as_uri(),
        **{name: f"127.0.0.1:{number}" for name, number in zip(PORTS, ports, strict=True)},
    }
    return [part for name, value in values.items() for part in ("-D", f"{name}={value}")]


def wait_for_port(port: int, log: Path) -> None:
    """Wait for the NameNode; the client would wait for it far longer."""
    deadline = time.monotonic() + UP_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError as error:
            check_time(deadline, error, log)


def wait_for_data_node(root: str, log: Path) -> None:
    """Wait for a place where files can be."""
    system = file_system(root)
    deadline = time.monotonic() + UP_SECONDS
    while True:
        try:
            with system.open_output_stream("/up") as file:
                file.write(b"up")
            return
        except (OSError, RuntimeError) as error:
            check_time(deadline, error, log)


def check_time(deadline: float, error: Exception, log: Path) -> None:
    """Wait for a moment, or fail."""
    if time.monotonic() > deadline:
        raise AssertionError(f"HDFS is not up: {error}\n{log.read_text()[-2000:]}") from error
    time.sleep(0.2)


def file_system(root: str) -> fs.FileSystem:
    """Return HDFS as pyarrow sees it, through hdfs-native."""
    return fs.FileSystem.from_uri(f"fsspec+{root}/")[0]


@pytest.mark.parametrize("kind", ["parquet", "tfrecord"])
def test_nodes_read_their_files_from_hdfs(spark: Any, root: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the test extra is not installed")
    example = runpy.run_path(str(EXAMPLE))
    example["write_files"](tmp_path)
    fs.copy_files(str(tmp_path / kind), f"/{kind}", destination_filesystem=file_system(root))

    args = argparse.Namespace(format=kind, uri=f"fsspec+{root}/{kind}", epochs=8)
    results = example["run"](example["main"], args, spark=spark, num_workers=2)
    assert [result["files"] for result in results] == [
        [f"/{kind}/{number}.{kind}" for number in numbers] for numbers in ((0, 2, 4), (1, 3, 5))
    ]
    assert all(result["accuracy"] > 0.85 for result in results)


def export_scales(places: list[str], ctx: Any) -> None:
    """Save models that multiply by two and then, in their place, by three; runs in a node."""
    import keras

    for factor in (2.0, 3.0):
        model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Rescaling(factor)])
        for place in places:
            ctx.export(model, place, overwrite=factor > 2)


def test_the_chief_replaces_models_on_hdfs_whole(spark: Any, root: str, tmp_path: Path) -> None:
    import keras
    import numpy as np
    import tensorflow as tf

    from sparktf import run

    run(export_scales, [f"{root}/models/scale.keras", f"{root}/models/scale"], spark=spark)
    system = file_system(root)
    listed = {file.path: file.type for file in system.get_file_info(fs.FileSelector("/models"))}
    assert listed == {"/models/scale.keras": fs.FileType.File, "/models/scale": fs.FileType.Directory}
    fs.copy_files("/models", str(tmp_path), source_filesystem=system)
    ones = np.ones((3, 1), "float32")
    model = keras.models.load_model(tmp_path / "scale.keras")
    np.testing.assert_array_equal(model.predict(ones, verbose=0), 3 * ones)
    np.testing.assert_array_equal(tf.saved_model.load(str(tmp_path / "scale")).serve(ones), 3 * ones)
