"""`thrifty verify`: compute a certificate again from its recorded losses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thrifty.cli._options import Json, print_json
from thrifty.errors import InvalidInput


def verify(
    path: Annotated[Path, typer.Argument(help="A certificate, as `thrifty tune` wrote it.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="The examples it was made with (JSONL): check that they are the same."),
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", help="File with the key that it is signed with.")] = None,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="File with the public half of an Ed25519 key, in PEM.")
    ] = None,
    json: Json = False,
) -> None:
    """Compute a certificate again from its recorded losses. Exit code 5 when it does not hold or was revoked."""
    from thrifty.bench.task import load
    from thrifty.ledger.chain import Ed25519Key, load_key
    from thrifty.tune.certificate import Certificate, CertificateRefuted
    from thrifty.tune.recompute import check_data, recompute
    from thrifty.tune.revocation import revocation_of

    if key is not None and public_key is not None:
        raise InvalidInput("--key and --public-key: give one of them")
    certificate = Certificate.load(path)
    checker = None if (source := key or public_key) is None else load_key(source)
    if public_key is not None and not isinstance(checker, Ed25519Key):
        raise InvalidInput(f"--public-key {public_key}: an Ed25519 key in PEM is needed; an HMAC key goes to --key")
    found = recompute(certificate)
    problems = list(found.problems)
    if data is not None:
        problems += check_data(certificate, load(data))
    signed = None if checker is None else certificate.verify_signature(checker)
    if checker is not None and not signed:
        problems.append("it is not signed" if signed is None else "its signature is not this key's, or it was changed")
    revocation = revocation_of(path, certificate.hash)
    unseen = _cannot_detect(bool(certificate.signature), signed is True, data is not None)
    if json:
        print_json(
            {
                **found.to_dict(),
                "ok": not problems and revocation is None,
                "problems": problems,
                "statement": certificate.statement(),
                "hash": certificate.hash,
                "signed": signed,
                "data_checked": data is not None,
                "revoked": None if revocation is None else {"at": revocation.at, "reason": revocation.reason},
                "cannot_detect": unseen,
            }
        )
    else:
        typer.echo(certificate.statement())
        if found.value is not None:
            figure = ("p value", found.p_value) if found.corrected is None else ("corrected risk", found.corrected)
            typer.echo(
                f"computed again: mean loss {found.value:.4g} on {certificate.n} groups, {figure[0]} {figure[1]:.4g}, "
                f"{found.certified} of {len(certificate.tested)} tested plans certified"
            )
        if certificate.spent is not None and certificate.uses > 1:
            typer.echo(
                f"use {certificate.uses} of these examples: all certificates made with them are right together but for "
                f"a chance of {certificate.spent:.4g}"
            )
        for problem in problems:
            typer.echo(f"problem: {problem}")
        for line in unseen:
            typer.echo(f"cannot detect: {line}")
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise CertificateRefuted(f"{path}: does not verify, {count}: {problems[0]}")
    if revocation is not None:
        raise CertificateRefuted(
            f"{path}: was revoked{f' on {revocation.at}' if revocation.at else ''}: {revocation.reason}"
        )
    if not json:
        typer.echo("verified")


def _cannot_detect(has_signature: bool, checked: bool, with_data: bool) -> list[str]:
    lines = []
    if not checked:
        hint = "give its key" if has_signature else "it is not signed"
        lines.append(f"whether the whole file was written anew, losses and figures alike: {hint}")
    if not with_data:
        lines.append("whether the examples have changed since: give them with --data")
    lines.append("whether the recorded losses are what the plan really scored: run it on the examples again")
    return lines
