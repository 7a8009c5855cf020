"""modepath keys: make, list and revoke the API keys of a service."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from service.access import keys
from service.access.keys import SCOPES, KeyFileError


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        "modepath keys",
        description="API keys of a service. It reads them from the file that MODEPATH_KEYS_FILE names, again within a second of each change.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    command = commands.add_parser("add", help="make a key, and print it once; the file holds only its hash")
    command.add_argument(
        "name", metavar="NAME", help="the caller; a second key of one name can replace the first without a gap"
    )
    command.add_argument(
        "--scope", action="append", required=True, choices=SCOPES,
        help="what it may do (several times): predict; feedback; read ensembles, metrics and pages; admin: all, and activate versions",
    )  # fmt: skip
    command.add_argument(
        "--rows-per-minute",
        type=int,
        metavar="N",
        help="largest number of images or other rows per minute (default: any number)",
    )
    _file(command)
    command = commands.add_parser("list", help="show the keys of a file: name, id, scopes, quota, time of creation")
    _file(command)
    command = commands.add_parser("revoke", help="remove the keys of a name; they are refused within a second")
    command.add_argument("name", metavar="NAME")
    command.add_argument("--id", metavar="ID", help="only the key with this id")
    _file(command)
    args = parser.parse_args()
    try:
        if args.command == "add":
            secret = keys.add(args.file, args.name, args.scope, args.rows_per_minute)
            print(f"The key of {args.name}, which is shown only now:", file=sys.stderr)
            print(secret)
        elif args.command == "list":
            for key in keys.read(args.file):
                quota = f"{key.rows_per_minute} rows per minute" if key.rows_per_minute else "any number of rows"
                print(f"{key.name}  {key.id}  {' '.join(key.scopes)}  {quota}  {key.created}")
        else:
            count = keys.revoke(args.file, args.name, args.id)
            print(f"revoked {count} key{'s' if count > 1 else ''} of {args.name}")
    except KeyFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _file(command: argparse.ArgumentParser) -> None:
    command.add_argument("--file", type=Path, required=True, metavar="FILE", help="the file of keys")


if __name__ == "__main__":
    sys.exit(main())
