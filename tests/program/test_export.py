"""Models come to their place whole, and a failure leaves the one that was there."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs

from sparktf.program import export


class Breaking(fs.LocalFileSystem):  # type: ignore[misc]
    """A file system that breaks down with a move of some number, and works again after it."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def move(self, src: str, dest: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError("the network is down")
        super().move(src, dest)


@pytest.fixture(params=["directories", "objects"])
def moves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Move directories as disks do, or files alone as object stores do."""
    if request.param == "objects":
        monkeypatch.setattr(export, "_OBJECT_STORES", ("local",))
    return str(request.param)


def write(directory: Path, content: str, names: tuple[str, ...]) -> Path:
    for name in ("saved_model.pb", "variables/variables.index", *names):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    return directory


def read(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def test_a_saved_model_takes_the_place_of_another(tmp_path: Path, moves: str) -> None:
    new = write(tmp_path / "new", "new", ("assets/words",))
    place = write(tmp_path / "models" / "model", "old", ("fingerprint.pb",))
    export._place(str(new), fs.LocalFileSystem(), str(place))
    assert read(place) == read(new)
    assert [path.name for path in place.parent.iterdir()] == ["model"]


def test_loaders_see_a_saved_model_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_OBJECT_STORES", ("local",))
    new = write(tmp_path / "new", "new", ("assets/words",))
    place = tmp_path / "models" / "model"
    place.parent.mkdir()
    seen: list[tuple[bool, int]] = []

    class Watched(fs.LocalFileSystem):  # type: ignore[misc]
        def move(self, src: str, dest: str) -> None:
            super().move(src, dest)
            seen.append(((place / "saved_model.pb").exists(), len(read(place))))

    export._place(str(new), Watched(), str(place))
    assert seen == [(False, 1), (False, 2), (True, 3)]


@pytest.mark.parametrize("at", range(1, 7))
def test_a_failure_leaves_the_old_model(tmp_path: Path, moves: str, at: int) -> None:
    if moves == "directories" and at > 2:
        pytest.skip("there are two moves")
    new = write(tmp_path / "new", "new", ("assets/words",))
    place = write(tmp_path / "models" / "model", "old", ("fingerprint.pb",))
    before = read(place)
    with pytest.raises(OSError, match="the network is down"):
        export._place(str(new), Breaking(at), str(place))
    assert read(place) == before
    assert [path.name for path in place.parent.iterdir()] == ["model"]


def test_where_the_old_model_cannot_come_back_the_error_says_where_it_is(tmp_path: Path) -> None:
    new = write(tmp_path / "new", "new", ())
    place = write(tmp_path / "models" / "model", "old", ())
    system = Breaking(2)
    move = system.move

    def move_and_stay_broken(src: str, dest: str) -> None:
        try:
            move(src, dest)
        except OSError:
            system.left = 1
            raise

    system.move = move_and_stay_broken
    with pytest.raises(OSError, match="the network is down") as raised:
        export._place(str(new), system, str(place))
    (aside,) = place.parent.iterdir()
    assert str(aside) in raised.value.__notes__[0]
    assert set(read(aside).values()) == {"old"}


def test_a_keras_file_takes_the_place_of_another_at_once(tmp_path: Path, moves: str) -> None:
    new, place = tmp_path / "new.keras", tmp_path / "models" / "model.keras"
    place.parent.mkdir()
    new.write_text("new")
    place.write_text("old")
    with pytest.raises(OSError, match="the network is down"):
        export._place(str(new), Breaking(1), str(place))
    assert place.read_text() == "old"
    export._place(str(new), fs.LocalFileSystem(), str(place))
    assert place.read_text() == "new"
    assert [path.name for path in place.parent.iterdir()] == ["model.keras"]


def test_where_no_file_is_moved_over_another_the_old_one_outlives_a_failure(tmp_path: Path) -> None:
    class Hdfs(Breaking):
        def move(self, src: str, dest: str) -> None:
            if Path(dest).exists():
                raise FileExistsError(dest)
            super().move(src, dest)

    new, place = tmp_path / "new.keras", tmp_path / "models" / "model.keras"
    place.parent.mkdir()
    new.write_text("new")
    place.write_text("old")
    for at in (1, 2):
        with pytest.raises(OSError, match="the network is down"):
            export._place(str(new), Hdfs(at), str(place))
        assert place.read_text() == "old"
    export._place(str(new), Hdfs(99), str(place))
    assert place.read_text() == "new"
    assert [path.name for path in place.parent.iterdir()] == ["model.keras"]
