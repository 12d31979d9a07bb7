import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from edgefl.flower.records import copy_records, record_of, records_bytes, tree_of


def test_a_tree_goes_there_and_back():
    tree = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7, np.int64)}
    back = tree_of(record_of(tree))
    assert list(back) == ["w", "n"]
    assert back["w"].dtype == np.float32
    assert back["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (back["n"].shape, int(back["n"])) == ((), 7)


def test_a_copy_shares_nothing_that_can_change():
    records = RecordDict(
        {
            "arrays": ArrayRecord([np.ones(2)]),
            "metrics": MetricRecord({"list": [1.0], "one": 2.0}),
            "config": ConfigRecord({"names": ["a"]}),
        }
    )
    twin = copy_records(records)
    twin["metrics"]["list"].append(9.0)
    twin["config"]["names"].append("b")
    twin["config"]["new"] = 1
    del twin["arrays"]
    assert records["metrics"]["list"] == [1.0]
    assert dict(records["config"]) == {"names": ["a"]}
    assert records["arrays"].to_numpy_ndarrays()[0].tolist() == [1, 1]


def test_bytes_are_counted_whatever_a_record_holds():
    records = RecordDict(
        {
            "config": ConfigRecord({"a": [], "b": "", "c": b"", "d": True, "e": [b"", b"xy"], "f": "three", "g": 1.5}),
            "metrics": MetricRecord({"h": [], "i": [1, 2], "j": 10**30}),
            "arrays": ArrayRecord(),
        }
    )
    assert records_bytes(records) == 10 + (0 + 0 + 0 + 1 + 2 + 5 + 8) + (0 + 16 + 8)
    array = Array(np.zeros(3))
    assert records_bytes(RecordDict({"a": ArrayRecord({"w": array})})) == 1 + len(array.data)
