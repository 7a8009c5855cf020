from models_store.reports.differences import differences, table
from tests.onnx_members import publish


def test_only_what_differs_is_named(store):
    first, same = publish(store, "a").manifest, publish(store, "a").manifest
    other = publish(store, "a", seeds=(0, 5), temperature=2.0, shape=(3, 4, 4)).manifest
    assert [field for field, *_ in differences(first, same) if field not in ("version", "created")] == []
    found = {field: values for field, *values in differences(first, other)}
    assert found["temperature"] == [1.0, 2.0]
    assert found["input.shape"] == [[1, 4, 4], [3, 4, 4]]
    assert found["members.count"] == [3, 2]
    assert found["members that both have"] == [0, 0]
    assert "method" not in found
    assert "classes" not in found


def test_members_that_both_versions_hold_are_counted(store):
    first, other = publish(store, "a", seeds=(0, 1)).manifest, publish(store, "a", seeds=(1, 2, 3)).manifest
    assert ("members that both have", 1, 1) in differences(first, other)


def test_the_table_has_a_column_for_each_version_and_cuts_long_values():
    lines = table([("temperature", 1.0, 2.0), ("classes", None, ["c" * 100])], ("a@1", "a@2"))
    assert lines[0].split() == ["a@1", "a@2"]
    assert lines[1].split() == ["temperature", "1", "2"]
    assert lines[2].split()[1] == "-"
    assert max(map(len, lines)) < 90
    assert "differ in nothing" in table([], ("a@1", "a@2"))[0]
