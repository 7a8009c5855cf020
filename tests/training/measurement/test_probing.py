from training.measurement.probing import Kept


def test_measured_points_are_not_measured_again_and_another_question_puts_them_aside(tmp_path):
    asked = []

    def ask(place):
        asked.append(place)
        return {"value": float(place)}

    file = tmp_path / "kept.jsonl"
    assert Kept(file, {"a": 1}).measure([1, 2], ask, "x") == [{"value": 1.0}, {"value": 2.0}]
    with file.open("a") as half:
        half.write('{"at": 3, "fou')  # killed while it wrote
    assert Kept(file, {"a": 1}).measure([1, 2, 3], ask, "x")[2] == {"value": 3.0}
    assert asked == [1, 2, 3]
    Kept(file, {"a": 2}).measure([1], ask, "x")
    assert asked == [1, 2, 3, 1]
    Kept(tmp_path / "kept.jsonl.before", {"a": 1}).measure([1, 2, 3], ask, "x")
    assert asked == [1, 2, 3, 1]
