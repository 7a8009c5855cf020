"""Labels are counted once each in SQLite and PostgreSQL, also by several processes; the database stays within its limits."""

import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy

from models_store.uncertainty import combine
from service.feedback.answers import Counted, of_answer, scored
from service.feedback.database import Database, Label, made_after, made_before, new_id

rng = np.random.default_rng(0)
NAMES = ["cat", "dog", "bird", "fish"]


def answer(when=None, rows=3, classes=4, **more):
    prediction = combine(rng.dirichlet(np.ones(classes), size=(1, rows)), np.ones(1))
    moment = time.time() if when is None else when
    return of_answer(
        new_id(moment), moment, "pets", 1, "average", prediction, shown=True, coverage=None, sets=None, decisions=None, **more
    )  # fmt: skip


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """A PostgreSQL server of its own, from Debian's package."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed (apt install postgresql)")
    pytest.importorskip("psycopg")
    folder = tmp_path_factory.mktemp("postgres")
    as_user = []
    if os.getuid() == 0:  # it refuses to run as root
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres")
        for parent in folder.parents:
            if parent != Path("/") and parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                parent.chmod(0o755)
    programs, data = found[-1].parent, folder / "data"
    subprocess.run(
        [*as_user, programs / "initdb", "-D", data, "--auth=trust", "--username=postgres", "--no-sync"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = subprocess.Popen(
        [*as_user, programs / "postgres", "-D", data, "-k", folder, "-h", ""],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"postgresql+psycopg://postgres@/postgres?host={folder}"
    engine = sqlalchemy.create_engine(url)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            engine.connect().close()
            break
        except sqlalchemy.exc.OperationalError:
            time.sleep(0.1)
    engine.dispose()
    yield url
    server.send_signal(signal.SIGQUIT)
    server.wait(20)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/new/feedback.db"
    found = request.getfixturevalue("postgres")
    engine = sqlalchemy.create_engine(found)
    with engine.begin() as connection:
        for table in ("answers", "feedback", "images"):
            connection.execute(sqlalchemy.text(f"DROP TABLE IF EXISTS {table}"))
    engine.dispose()
    return found


@pytest.fixture
def opened():
    """Opens databases, and closes them at the end."""
    found = []

    def opened(url):
        found.append(Database(url))
        return found[-1]

    yield opened
    for one in found:
        one.close()


def outcomes(database, *labels, oldest=0.0):
    return [
        outcome for outcome, _ in database.report([Label(*label) for label in labels], {("pets", 1): NAMES}, oldest)
    ]


def test_each_label_is_counted_once_and_others_are_rejected_with_the_reason(url, opened):
    database = opened(url)
    first, second = answer(), answer(rows=1)
    database.keep([first, second])
    found = database.report([Label(first.request_id, 2, 3)], {}, 0.0)
    assert found == [("accepted", Counted("pets", 1, "average", scored(first, 2, 3)))]
    assert outcomes(
        database,
        (first.request_id, 2, 3),  # counted before
        (first.request_id, 2, 1),  # also with another label
        (first.request_id, 0, "cat"),
        (first.request_id, 0, 0),  # twice in one list
        (first.request_id, 1, "horse"),
        (second.request_id, 1, 0),
        (second.request_id, 0, 4),
        (new_id(time.time()), 0, 0),
        ("not one of ours", 0, 0),
        ("a\0b", 0, 0),
        (new_id(1000), 0, 0),
        oldest=2000,
    ) == [
        "duplicate", "duplicate", "accepted", "duplicate", "name", "row", "label", "unknown", "unknown", "unknown", "expired",
    ]  # fmt: skip
    again = opened(url)  # as after a restart
    assert outcomes(again, (first.request_id, 0, 0), (second.request_id, 0, 0)) == ["duplicate", "accepted"]


def test_of_several_processes_that_report_the_same_labels_one_counts_each(url, opened):
    answers = [answer() for _ in range(60)]
    shared = [opened(url) for _ in range(4)]
    shared[0].keep(answers)
    labels = [(one.request_id, row, 0) for one in answers for row in range(3)]

    def report(number):
        order = np.random.default_rng(number).permutation(len(labels))
        return [
            outcomes(shared[number], *[labels[i] for i in some]).count("accepted") for some in np.array_split(order, 20)
        ]

    with ThreadPoolExecutor(4) as pool:
        assert sum(map(sum, pool.map(report, range(4)))) == len(labels)


def test_what_is_too_old_or_too_much_is_removed_the_oldest_first(url, opened):
    database = opened(url)
    now = time.time()
    answers = [answer(now - 1000 + i, images=((0, np.zeros((1, 4, 4), np.float32)),)) for i in range(100)]
    database.keep(answers)
    database.prune(now - 1000 + 19.5, 10**9)
    kept = [outcomes(database, (one.request_id, 0, 0), oldest=now - 980.5)[0] for one in answers]
    assert kept == ["expired"] * 20 + ["accepted"] * 80
    database.prune(0, sum(one.size for one in answers) // 4)
    kept = [outcomes(database, (one.request_id, 1, 0))[0] for one in answers]
    assert 10 <= kept.count("accepted") <= 26
    assert kept == sorted(kept, reverse=True)  # unknown ones, then the newest
    large = [answer(now, images=((0, np.zeros((3, 200, 200), np.float32)),)) for _ in range(10)]
    database.keep(large)
    database.prune(0, 10 * large[0].size + 100_000)  # an image takes what its file takes
    assert len({found[0] for found in database.images()} & {one.request_id for one in large}) == 10
    database.prune(now + 1, 0)
    assert list(database.images()) == []


def test_images_come_with_their_answer_and_label(url, opened):
    database = opened(url)
    image = rng.random((3, 5, 5), np.float32)
    first, second = answer(images=((1, image),)), answer(images=((0, image),))
    database.keep([first, second])
    outcomes(database, (first.request_id, 1, 2))
    found = list(database.images())
    assert [(request, row, label) for request, row, _, _, label in found] == [
        (first.request_id, 1, 2),
        (second.request_id, 0, None),
    ]
    assert found[0][2].startswith(b"\x89PNG")
    assert np.array_equal(found[1][3].labels, second.labels)


def test_a_driver_that_is_not_installed_and_a_folder_that_cannot_be_made_are_errors(tmp_path):
    with pytest.raises(ImportError):
        Database("mysql+pymysql://x@localhost/y")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        Database(f"sqlite:///{tmp_path}/file/feedback.db")


def test_many_large_answers_are_read_a_few_at_a_time(url, opened, monkeypatch):
    monkeypatch.setattr("service.feedback.database.MOST_BYTES", 3000)
    database = opened(url)
    answers = [answer(rows=20, classes=9) for _ in range(30)]
    database.keep(answers)
    parts = list(database._small_enough(sorted(one.request_id for one in answers)))
    assert sum(map(len, parts)) == 30
    assert 1 < max(map(len, parts)) <= 3000 // answers[0].size + 1
    assert outcomes(database, *((one.request_id, row, 0) for one in answers for row in range(20))) == ["accepted"] * 600


def test_ids_tell_their_time():
    assert made_before(new_id(1000), 2000)
    assert not made_before(new_id(3000), 2000)
    assert made_after(new_id(time.time()), 2000)
    assert not made_after(new_id(time.time() + 1000), 2000)
    assert not made_before("abc", 2000)
    assert len({new_id(5) for _ in range(1000)}) == 1000
