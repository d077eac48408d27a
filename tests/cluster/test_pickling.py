"""What cannot go to the nodes is named, and what can is pickled once."""

from __future__ import annotations

import pickle
import re
import sys
import threading
from pathlib import Path

import pytest
from pyspark import cloudpickle

from sparktf.cluster.pickling import pickled, portable
from sparktf.distribute.custom_objects import Imported, resolved, why_missing
from sparktf.errors import ParamError


class Counted:
    """Counts how often it is pickled."""

    times = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        type(self).times += 1
        return Counted, ()


def test_what_can_be_pickled_is_pickled_once() -> None:
    main = Counted()
    assert isinstance(pickle.loads(pickled((main, 1), {"main": main, "args": 1}))[0], Counted)
    assert Counted.times == 1


def test_the_part_that_cannot_be_pickled_is_named() -> None:
    main, args = Counted(), threading.Lock()
    with pytest.raises(ParamError, match=r"^args: expected what can be pickled .* received TypeError: .*lock"):
        pickled((main, args), {"main": main, "args": args})


def test_where_no_part_is_at_fault_all_are_named() -> None:
    with pytest.raises(ParamError, match=r"^main or args: expected what can be pickled"):
        pickled(threading.Lock(), {"main": 1, "args": 2})


def test_custom_objects_of_modules_go_by_name_and_others_as_they_are() -> None:
    def local() -> None: ...

    given = {"a>Counted": Counted, "b>local": local}
    assert portable(given) == {"a>Counted": Imported(__name__, "Counted"), "b>local": local}
    assert resolved(portable(given)) == given


def test_custom_objects_of_modules_that_are_pickled_by_value_go_as_they_are() -> None:
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        assert portable({"a>Counted": Counted}) == {"a>Counted": Counted}
    finally:
        cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.parametrize("missing", [Imported("no_such_library.layers", "Layer"), Imported(__name__, "NoSuchClass")])
def test_a_custom_object_that_a_node_lacks_is_left_out(missing: Imported) -> None:
    objects = {"a>Layer": missing, "b>Counted": Imported(__name__, "Counted")}
    assert resolved(objects) == {"b>Counted": Counted}
    reason = rf"the module '{missing.module}', which cannot be imported here \(\w+Error: "
    assert re.search(reason, why_missing("Layer", objects))
    assert why_missing("Counted", objects) == why_missing("Unknown", objects) == ""


def test_a_module_that_fails_in_a_way_of_its_own_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wants_a_gpu.py").write_text("raise OSError('libcuda.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolved({"a>Layer": Imported("wants_a_gpu", "Layer")}) == {}
