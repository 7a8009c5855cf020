"""The database of answers and of the labels that were reported for them. Any database that SQLAlchemy supports.

answers   one record per request that was answered: what is needed to score it once its labels are known
feedback  one record per label; its primary key (request_id, row) is what counts each label once
images    the images that the operator asked to keep
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy
from sqlalchemy import BigInteger, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, event, select
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from service.feedback.answers import Counted, Kept

_meta = MetaData()
_answers = Table(
    "answers",
    _meta,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("request_id", String(32), nullable=False, unique=True),
    Column("time", Float, nullable=False),
    Column("size", Integer, nullable=False),  # bytes, about
    Column("ensemble", String(64), nullable=False),
    Column("version", Integer, nullable=False),
    Column("mode", String(16), nullable=False),
    Column("classes", Integer, nullable=False),
    Column("labels", LargeBinary, nullable=False),  # int32 (rows,)
    Column("confidence", LargeBinary),  # float64 (rows,); null if the policy hides it, like the following
    Column("probs", LargeBinary),  # float32 (rows, classes)
    Column("coverage", Float),  # of the prediction sets; null if none were asked for
    Column("sets", LargeBinary),  # bits (rows, classes), packed
    Column("answered", LargeBinary),  # uint8 (rows,): 1 where the decision is "predict"; null without decisions
    Index("answers_by_time", "time"),
)
_feedback = Table(
    "feedback",
    _meta,
    Column("request_id", String(32), primary_key=True),
    Column("row", Integer, primary_key=True),
    Column("label", Integer, nullable=False),
    Column("time", Float, nullable=False),
    Index("feedback_by_time", "time"),
)
_images = Table(
    "images",
    _meta,
    Column("request_id", String(32), primary_key=True),
    Column("row", Integer, primary_key=True),
    Column("time", Float, nullable=False),
    Column("size", Integer, nullable=False),
    Column("file", LargeBinary, nullable=False),  # PNG
    Index("images_by_time", "time"),
)
Outcome = Literal["accepted", "duplicate", "unknown", "expired", "row", "label", "name"]
Classes = Mapping[tuple[str, int], Sequence[str]]
BUSY_SECONDS = 5.0
MOST_BYTES = 16 * 2**20  # of answers that are in memory at once
CONNECT_SECONDS, STATEMENT_SECONDS = 5, 10  # limits for PostgreSQL
AT_ONCE = 200  # request ids of one query; databases limit the number of parameters


@dataclass(frozen=True, slots=True)
class Label:
    """A label that a client reports for a row of an earlier answer."""

    request_id: str
    row: int
    label: int | str  # index of the class, or its name


class Database:
    """Answers and labels. Several processes may use one database; every method may be called from any thread."""

    def __init__(self, url: str):
        """Open the database, and create its tables if they do not exist.

        Raises:
            SQLAlchemyError: it cannot be opened, or its driver is not installed (an ImportError).
        """
        address = sqlalchemy.make_url(url)
        local = address.get_backend_name() == "sqlite"
        if local and address.database:
            Path(address.database).parent.mkdir(parents=True, exist_ok=True)
        more: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}} if local else {"pool_pre_ping": True}
        if address.get_backend_name() == "postgresql":
            limit = f"-c statement_timeout={1000 * STATEMENT_SECONDS}"
            more["connect_args"] = {"connect_timeout": CONNECT_SECONDS, "options": limit}
        self._engine = sqlalchemy.create_engine(address, **more)
        if local:
            event.listen(self._engine, "connect", _use_wal)
        with suppress(IntegrityError, OperationalError, ProgrammingError):
            # Another worker may create the same tables at the same time.
            _meta.create_all(self._engine)
        with self._engine.connect() as connection:  # fails if the tables do not exist
            connection.execute(select(_answers.c.number).limit(1))

    def keep(self, answers: Sequence[Kept]) -> None:
        """Store answers, and the images that belong to them, in one transaction."""
        with self._engine.begin() as connection:
            connection.execute(_answers.insert(), [answer.record() for answer in answers])
            if images := [image for answer in answers for image in answer.images()]:
                connection.execute(_images.insert(), images)

    def report(self, labels: Sequence[Label], classes: Classes, oldest: float) -> list[tuple[Outcome, Counted | None]]:
        """Store labels, each (request_id, row) once.

        Args:
            labels: what clients report.
            classes: (ensemble, version) -> its class names, for labels that are names.
            oldest: answers from before this time are expired, if they are not stored any more.

        Returns:
            For each label what became of it, and what to count if it was accepted.
        """
        outcomes: list[tuple[Outcome, Counted | None]] = [("unknown", None)] * len(labels)
        by_id: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            if _time_of(label.request_id) is not None:  # others were not made here
                by_id.setdefault(label.request_id, []).append(index)
        ids = sorted(by_id)
        for start in range(0, len(ids), AT_ONCE):
            for some in self._small_enough(ids[start : start + AT_ONCE]):
                chosen = [index for request_id in some for index in by_id[request_id]]
                for index, outcome in zip(
                    chosen, self._report_retrying([labels[index] for index in chosen], classes, oldest), strict=True
                ):
                    outcomes[index] = outcome
        return outcomes

    def _small_enough(self, ids: Sequence[str]) -> Iterator[list[str]]:
        """Divide the ids so that the answers of each part take at most MOST_BYTES in memory."""
        query = select(_answers.c.request_id, _answers.c.size).where(_answers.c.request_id.in_(ids))
        with self._engine.connect() as connection:
            sizes = {row[0]: int(row[1]) for row in connection.execute(query)}
        part: list[str] = []
        total = 0
        for request_id in ids:
            size = sizes.get(request_id, 0)
            if part and total + size > MOST_BYTES:
                yield part
                part, total = [], 0
            part.append(request_id)
            total += size
        yield part

    def _report_retrying(
        self, labels: Sequence[Label], classes: Classes, oldest: float
    ) -> list[tuple[Outcome, Counted | None]]:
        while True:
            try:
                with self._engine.begin() as connection:
                    return self._report(connection, labels, classes, oldest)
            except IntegrityError:  # another worker has just stored one of them: now it is a duplicate
                continue

    def _report(
        self, connection: sqlalchemy.Connection, labels: Sequence[Label], classes: Classes, oldest: float
    ) -> list[tuple[Outcome, Counted | None]]:
        ids = sorted({label.request_id for label in labels})
        found = connection.execute(select(_answers).where(_answers.c.request_id.in_(ids))).mappings()
        answers = {row["request_id"]: Kept.of_record(row) for row in found}
        query = select(_feedback.c.request_id, _feedback.c.row).where(_feedback.c.request_id.in_(ids))
        counted = {(row[0], row[1]) for row in connection.execute(query)}
        outcomes: list[tuple[Outcome, Counted | None]] = []
        new: list[dict[str, Any]] = []
        now = time.time()
        for one in labels:
            answer = answers.get(one.request_id)
            if answer is None:
                outcomes.append(("expired" if made_before(one.request_id, oldest) else "unknown", None))
                continue
            number = _number(one.label, classes.get((answer.ensemble, answer.version), ()))
            if not 0 <= one.row < answer.rows:
                outcomes.append(("row", None))
            elif number is None:
                outcomes.append(("name", None))
            elif not 0 <= number < answer.classes:
                outcomes.append(("label", None))
            elif (one.request_id, one.row) in counted:
                outcomes.append(("duplicate", None))
            else:
                counted.add((one.request_id, one.row))
                new.append({"request_id": one.request_id, "row": one.row, "label": number, "time": now})
                outcomes.append(("accepted", Counted.of(answer, one.row, number)))
        if new:
            connection.execute(_feedback.insert(), new)
        return outcomes

    def prune(self, oldest: float, most_bytes: int) -> None:
        """Remove what is older than `oldest`, then the oldest answers and images until they take `most_bytes` together."""
        with self._engine.begin() as connection:
            for table in (_answers, _feedback, _images):
                connection.execute(table.delete().where(table.c.time < oldest))
        for table in (_images, _answers):
            while (excess := self._bytes() - most_bytes) > 0 and self._drop_oldest(table, excess):
                pass

    def _bytes(self) -> int:
        with self._engine.connect() as connection:
            return sum(
                connection.execute(select(sqlalchemy.func.coalesce(sqlalchemy.func.sum(table.c.size), 0))).scalar_one()
                for table in (_answers, _images)
            )

    def _drop_oldest(self, table: Table, excess: int) -> int:
        """Remove the oldest records of about `excess` bytes; return how many."""
        with self._engine.begin() as connection:
            limit, passed = 0.0, 0
            for when, size in connection.execute(
                select(table.c.time, table.c.size).order_by(table.c.time).limit(10_000)
            ):
                limit, passed = when, passed + size
                if passed >= excess:
                    break
            return connection.execute(table.delete().where(table.c.time <= limit)).rowcount

    def images(self) -> Iterable[tuple[str, int, bytes, Kept | None, int | None]]:
        """Each kept image: request, row, PNG file, the answer if it is still stored, and the label if it was reported."""
        join = _images.outerjoin(
            _feedback, (_images.c.request_id == _feedback.c.request_id) & (_images.c.row == _feedback.c.row)
        )
        query = select(_images.c.request_id, _images.c.row, _images.c.file, _feedback.c.label).select_from(join)
        with self._engine.connect() as connection:
            for request_id, row, file, label in connection.execute(query.order_by(_images.c.time)):
                found = (
                    connection.execute(select(_answers).where(_answers.c.request_id == request_id)).mappings().first()
                )
                yield request_id, row, file, Kept.of_record(found) if found is not None else None, label

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def new_id(when: float) -> str:
    """The id of an answer: 8 hexadecimal digits of its time in seconds, so that expired ids are recognised, and 16 random ones."""
    return f"{int(when):08x}{secrets.token_hex(8)}"


def _number(label: int | str, names: Sequence[str]) -> int | None:
    if isinstance(label, int):
        return label
    return names.index(label) if label in names else None


def made_before(request_id: str, when: float) -> bool:
    """True if this is an id of an answer from before this time."""
    return (made := _time_of(request_id)) is not None and made < when


def made_after(request_id: str, when: float) -> bool:
    """True if this is an id of an answer from between this time and now."""
    return (made := _time_of(request_id)) is not None and int(when) <= made <= time.time() + 1


def _time_of(request_id: str) -> int | None:
    return int(request_id[:8], 16) if re.fullmatch(r"[0-9a-f]{24}", request_id) else None


def _use_wal(connection: Any, record: object) -> None:
    # Readers and one writer at a time do not block each other. A power failure may lose the last answers, not the file.
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()
