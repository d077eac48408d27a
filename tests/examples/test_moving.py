"""Each example of the move from TensorFlowOnSpark runs, and learns something."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark import cloudpickle

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).parents[2] / "examples" / "moving"


@pytest.fixture(scope="module", autouse=True)
def as_scripts() -> Iterator[None]:
    """Put the examples' directory on the path, as for a script that lies there."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def loaded(name: str) -> Any:
    """Import an example; its functions travel to the nodes as those of a script do, not by their module's name."""
    module = importlib.import_module(name)
    if name not in cloudpickle.list_registry_pickle_by_value():
        cloudpickle.register_pickle_by_value(module)
    return module


def arguments(directory: Path, **more: Any) -> Namespace:
    paths = {
        name: str(directory / name) for name in ("export_dir", "images_labels", "output", "arriving", "checkpoint")
    }
    given = {"batch_size": 64, "cluster_size": 2, "epochs": 2, "model": str(directory / "model.keras"), **paths, **more}
    return Namespace(**given)


def test_digits_fed_by_spark_then_read_from_files_then_scored_in_parallel(spark: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    accuracies = loaded("mnist_spark").train(spark, args)
    assert accuracies[0] > 0.9

    files = loaded("mnist_files")
    args.rows = files.write(spark, args.images_labels)
    assert args.rows == 5000
    assert len(list(Path(args.images_labels).iterdir())) == 8
    assert files.train(spark, args)[0] > 0.85

    counts = loaded("inference").score(spark, args)
    rows, right = (sum(count) for count in zip(*counts, strict=True))
    assert rows == 5000
    assert right / rows > 0.9
    written = [line.split() for part in sorted(Path(args.output).iterdir()) for line in part.open()]
    assert sum(label == digit for label, digit in written) == right
    assert len(written) == rows


def test_the_pipeline_stage_and_its_saved_model_score_alike(spark: Any, tmp_path: Path) -> None:
    fitted, from_file = loaded("pipeline").accuracy(spark, arguments(tmp_path))
    assert fitted > 0.85
    assert from_file == pytest.approx(fitted)


def test_the_segmentation_finds_discs(spark: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path, images=256, batch_size=16, epochs=12)
    overlaps = loaded("segmentation").train(spark, args)
    assert overlaps[0] == overlaps[1] > 0.6
    assert (tmp_path / "export_dir" / "saved_model.pb").is_file()


def test_the_stream_trains_on_and_on(spark: Any, tmp_path: Path) -> None:
    streaming, args = loaded("streaming"), arguments(tmp_path, batch_size=32)
    streaming.arrive(spark, args.arriving, files=2)
    told = streaming.train(spark, args)
    # 2,500 rows a micro-batch, 39 or so steps of both workers each.
    assert [38 * n <= steps <= 40 * n for n, (_, steps) in enumerate(told, 1)] == [True, True]
    assert told[1][0] > told[0][0]
    # What has been read is not read again.
    assert streaming.train(spark, args) == []
