"""Keys in a database: SQLite by default, PostgreSQL for several replicas."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from thrifty.errors import InvalidInput, LedgerError
from thrifty.serve.keys import Key
from thrifty.serve.policy import Loaded

_META = sa.MetaData()
KEYS = sa.Table(
    "keys",
    _META,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
    sa.Column("body", sa.Text, nullable=False),
)
VERSION = sa.Table("version", _META, sa.Column("n", sa.BigInteger, primary_key=True))


class DatabaseKeys:
    """See `keys.KeyStore`."""

    def __init__(self, url: str) -> None:
        self._engine = sa.create_engine(url, pool_pre_ping=True)
        try:
            _META.create_all(self._engine)
            with self._engine.begin() as connection:
                if connection.execute(sa.select(VERSION.c.n)).first() is None:
                    connection.execute(VERSION.insert().values(n=1))
        except sa.exc.SQLAlchemyError as error:
            raise LedgerError(f"state {_shown(url)} cannot be opened: {_line(error)}") from error

    def all(self) -> Iterable[Key]:
        """See `KeyStore`."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(KEYS.c.id, KEYS.c.name, KEYS.c.hash, KEYS.c.body)).all()
        return [_key(*row) for row in rows]

    def put(self, key: Key) -> None:
        """See `KeyStore`."""
        row = {"id": key.id, "name": key.name, "hash": key.hash, "body": json.dumps(_body(key))}
        try:
            with self._engine.begin() as connection:
                connection.execute(KEYS.delete().where(KEYS.c.id == key.id))
                connection.execute(KEYS.insert().values(**row))
                self._changed(connection)
        except sa.exc.IntegrityError as error:
            raise InvalidInput(f"key name {key.name!r} is taken: choose another") from error

    def remove(self, id: str) -> None:
        """See `KeyStore`."""
        with self._engine.begin() as connection:
            if not connection.execute(KEYS.delete().where(KEYS.c.id == id)).rowcount:
                raise InvalidInput(f"no key {id!r}: thrifty key list shows them")
            self._changed(connection)

    def version(self) -> int:
        """See `KeyStore`."""
        with self._engine.connect() as connection:
            return int(connection.execute(sa.select(VERSION.c.n)).scalar_one())

    def close(self) -> None:
        """Closes its connections."""
        self._engine.dispose()

    @staticmethod
    def _changed(connection: sa.Connection) -> None:
        connection.execute(VERSION.update().values(n=VERSION.c.n + 1))


def open_keys(loaded: Loaded) -> DatabaseKeys:
    """The key store that a policy names. Raises InvalidInput for a variable that is not set, LedgerError."""
    return DatabaseKeys(url_of(loaded.policy.server.state, loaded.folder))


def url_of(text: str, folder: Path) -> str:
    """A database address: `env:NAME` reads a variable, another text is a SQLite file."""
    if text.startswith("env:"):
        value = os.environ.get(text[4:], "")
        if not value:
            raise InvalidInput(f"environment variable {text[4:]} is not set: put the database's address there")
        return value.replace("postgresql://", "postgresql+psycopg://", 1)
    return f"sqlite:///{folder / Path(text).expanduser()}"


def _body(key: Key) -> dict[str, Any]:
    return {k: v for k, v in key.to_dict().items() if k not in ("id", "name")}


def _key(id: str, name: str, hash: str, body: str) -> Key:
    fields: dict[str, Any] = json.loads(body)
    for name_of_list in ("models", "plans", "upstreams", "limits"):
        fields[name_of_list] = tuple(fields[name_of_list])
    return Key(id=id, name=name, hash=hash, **fields)


def _shown(url: str) -> str:
    return sa.make_url(url).render_as_string(hide_password=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
