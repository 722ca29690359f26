"""Certificates: they come out again, any change shows, and what was not certified cannot be issued."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import Budget, Plan
from thrifty.bench.task import Task
from thrifty.errors import InvalidInput, ThriftyError
from thrifty.ledger.chain import HmacKey, load_key
from thrifty.tune.calibration import Claim, Use
from thrifty.tune.certificate import (
    Certificate,
    CertificateRefuted,
    Figure,
    Saving,
    SplitUsed,
    issue,
)
from thrifty.tune.losses import Losses
from thrifty.tune.recompute import check_data, recompute
from thrifty.tune.revocation import Revocation, revocation_of, revocation_path, revoke
from thrifty.tune.splits import data_hash, groups_of, split

N = 60
TASKS = [Task(id=f"t{i}", messages=({"role": "user", "content": f"q{i}"},), gold="1") for i in range(2 * N)]
PARTS = split(TASKS, shares=(0.3, 0.5, 0.2), seed=4)
GROUPS = groups_of(PARTS.calibration)
REFERENCE, SAFE, CHEAP, BAD = (
    Plan(name, budget=Budget(output=n)) for name, n in (("reference", 99), ("safe", 50), ("cheap", 20), ("bad", 1))
)
PLANS = (SAFE, CHEAP, BAD)
LTT = Claim("error", 0.2, 0.1, bound="clopper-pearson")
CRC = Claim("error", 0.2, None, "conformal-risk-control")


def losses(wrong: int, kind: Any = "error") -> Losses:
    values = np.zeros(N)
    values[:wrong] = 1
    return Losses(kind, values, -1.0 if kind == "drop" else 0.0, 1.0, GROUPS)


def use(claim: Claim = LTT, **changes: Any) -> Use:
    known = Use(
        1,
        data_hash(PARTS.calibration),
        "search",
        claim,
        "refuse",
        claim.delta,
        claim.delta,
        "2026-11-25T00:00:00+00:00",
    )
    return replace(known, **changes)


def make(claim: Claim = LTT, plan: Plan = CHEAP, wrong: tuple[int, ...] = (2, 4, 30), **changes: Any) -> Certificate:
    given: dict[str, Any] = {
        "plan": plan,
        "reference": REFERENCE,
        "search_hash": "search",
        "order": [p.hash for p in PLANS],
        "use": use(claim),
        "tested": [(p, losses(w, claim.loss)) for p, w in zip(PLANS, wrong, strict=False)],
        "engines": {"answer": {"model": "m", "dtype": "fp32", "batch": 1}},
        "split": SplitUsed(data_hash(TASKS), (0.3, 0.5, 0.2), 4),
        "holdout": Figure(np.float64(0.1), 0, 0.3, 0.95, 24),
        "saving": Saving("tokens", Figure(0.5, 0.4, 0.6, 0.95, 60), 100, 50),
    }
    return issue(**{**given, **changes})


def test_what_it_says_is_what_the_losses_give() -> None:
    certificate = make()
    # oracles: the mean of 4 losses of 1 in 60, and the binomial sum written out
    tail = sum(math.comb(N, k) * 0.2**k * 0.8 ** (N - k) for k in range(5))
    assert certificate.value == pytest.approx(4 / 60)
    assert certificate.p_value == pytest.approx(tail, rel=1e-12)
    assert (certificate.n, certificate.model, certificate.dtype) == (60, "m", "fp32")
    assert set(certificate.versions) >= {"thrifty", "python", "numpy", "scipy"}
    found = recompute(certificate)
    assert found.ok and found.certified == 2
    assert "at most 0.2" in certificate.statement() and "n = 60" in certificate.statement()


def test_conformal_risk_control() -> None:
    certificate = make(CRC, wrong=(0, 5, 30))
    assert certificate.corrected == pytest.approx((5 + 1) / 61)
    assert certificate.delta is None and certificate.p_value is None
    assert recompute(certificate).ok and "in expectation" in certificate.statement()
    with pytest.raises(CertificateRefuted, match="above alpha"):
        make(CRC, plan=BAD, wrong=(0, 5, 30))


def test_a_drop_may_be_negative() -> None:
    claim = Claim("drop", 0.1, 0.1, bound="betting")
    better = Losses("drop", np.where(np.arange(N) % 3 == 0, -1.0, 0.0), -1, 1, GROUPS)
    certificate = make(claim, plan=SAFE, tested=[(SAFE, better)])
    assert certificate.value == pytest.approx(-1 / 3) and recompute(certificate).ok


def test_what_the_test_does_not_certify_cannot_be_issued() -> None:
    with pytest.raises(CertificateRefuted, match="p value .* above delta"):
        make(plan=BAD)
    with pytest.raises(CertificateRefuted, match="stands behind"):
        make(plan=CHEAP, wrong=(30, 0, 30))  # its own p value is small: the test had stopped before
    with pytest.raises(CertificateRefuted, match="not among the plans"):
        make(plan=REFERENCE)
    with pytest.raises(CertificateRefuted, match="order that was frozen"):
        make(tested=[(CHEAP, losses(0))])
    with pytest.raises(InvalidInput, match="same groups and loss"):
        make(tested=[(SAFE, losses(0)), (CHEAP, losses(0, "disagree"))])
    with pytest.raises(InvalidInput, match="at least one"):
        make(tested=[])


def test_a_further_use_is_tested_at_its_smaller_delta() -> None:
    with pytest.raises(CertificateRefuted, match="above delta"):
        make(wrong=(2, 7, 30), use=use(k=3, delta=0.0125, spent=0.0875))
    assert make(wrong=(2, 7, 30)).delta == 0.1
    certificate = make(wrong=(2, 4, 30), use=use(k=3, delta=0.0125, spent=0.0875))
    assert (certificate.uses, certificate.delta, certificate.claim.delta, certificate.spent) == (3, 0.0125, 0.1, 0.0875)


def test_the_reference_needs_no_place_in_the_order() -> None:
    order = [SAFE.hash, REFERENCE.hash, CHEAP.hash, BAD.hash]
    assert recompute(make(order=order)).ok
    tested = [(REFERENCE, losses(0)), (SAFE, losses(1)), (CHEAP, losses(2))]
    assert recompute(make(order=order, tested=tested)).ok


@pytest.mark.parametrize("claim", [LTT, CRC])
def test_json_and_back(claim: Claim, tmp_path: Path) -> None:
    certificate = make(claim, wrong=(0, 1, 30))
    assert Certificate.from_json(certificate.to_json()) == certificate
    assert Certificate.from_json(certificate.to_json()).hash == certificate.hash
    certificate.save(tmp_path / "new" / "c.json")
    assert Certificate.load(tmp_path / "new" / "c.json") == certificate
    assert os.listdir(tmp_path / "new") == ["c.json"]


CHANGES: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("the mean loss", lambda c: c.update(value=0.01)),
    ("the p value", lambda c: c.update(p_value=0.0001)),
    ("the corrected risk", lambda c: c.update(corrected=0.1)),
    ("n is stated", lambda c: c.update(n=600)),
    ("59 losses for 60 groups", lambda c: c["tested"][1]["losses"].pop()),
    ("the mean loss", lambda c: c["tested"][1]["losses"].__setitem__(0, 0.0)),
    ("order that was frozen", lambda c: c["tested"].pop(0)),
    ("order that was frozen", lambda c: c["tested"].reverse()),
    ("tested twice", lambda c: c["tested"].append(c["tested"][1])),
    ("has the hash", lambda c: c.update(plan_toml=c["plan_toml"].replace("20", "21"))),
    ("cannot be read here", lambda c: c.update(plan_toml="[[methods]]\nuse = 'no-such-method'")),
    ("not among", lambda c: c.update(plan_hash=REFERENCE.hash, plan_toml=REFERENCE.to_toml())),
    ("not certified", lambda c: c.update(alpha=0.07)),
    ("was asked for", lambda c: c.update(delta=0.2)),
    ("was asked for", lambda c: c.update(delta=None)),
    ("sum of all deltas", lambda c: c.update(spent=0.01)),
    ("lies in [0, 1]", lambda c: c["tested"][1]["losses"].__setitem__(0, 2.0)),
    ("sorted", lambda c: c["groups"].reverse()),
]


@pytest.mark.parametrize(("words", "change"), CHANGES)
def test_a_change_shows(words: str, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(make().to_json())
    change(data)
    found = recompute(Certificate.from_dict(data))
    assert not found.ok and any(words in problem for problem in found.problems), found.problems


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("tested"), "`tested` is missing"),
        (lambda c: c.update(alhpa=1), "did you mean 'alpha'"),
        (lambda c: c.update(alpha=0), "alpha 0"),
        (lambda c: c.update(alpha=True), "a number is needed"),
        (lambda c: c.update(delta_asked=1.0), "delta 1.0"),
        (lambda c: c.update(bound="gauss"), "unknown bound"),
        (lambda c: c.update(thrifty_certificate=99), "use a newer one"),
        (lambda c: c.pop("thrifty_certificate"), "thrifty_certificate"),
        (lambda c: c.update(n=1.5), "whole number"),
        (lambda c: c.update(groups=[1]), "list of texts"),
        (lambda c: c.update(engines=[]), "an object"),
        (lambda c: c["tested"][0].pop("name"), "plan, name and losses"),
        (lambda c: c["tested"][0]["losses"].append("x"), "not all numbers"),
        (lambda c: c["holdout"].pop("n"), "value"),
        (lambda c: c.update(split={"seed": 1}), "shares"),
    ],
)
def test_what_is_no_certificate_is_refused(change: Callable[[dict[str, Any]], None], words: str) -> None:
    data = json.loads(make().to_json())
    change(data)
    with pytest.raises(InvalidInput) as refused:
        Certificate.from_dict(data)
    assert words in str(refused.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(json.loads(make().to_json()))), json_values)
@settings(max_examples=300, deadline=None)
def test_any_value_in_any_field_is_read_or_refused(name: str, value: Any) -> None:
    data = json.loads(make().to_json())
    data[name] = value
    try:
        certificate = Certificate.from_dict(data)
    except InvalidInput:
        return
    recompute(certificate)  # may find problems; never another error


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content in (("a.json", b"{"), ("b.json", b"[1]"), ("c.json", b'{"alpha": NaN}'), ("d.json", b"\xff")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidInput, match=name):
            Certificate.load(tmp_path / name)
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InvalidInput, match="cannot be read"):
            Certificate.load(path)
    with pytest.raises(ThriftyError, match="cannot be written"):
        make().save(tmp_path / "a.json" / "below.json")


# -- signatures --------------------------------------------------------------------------------------------------


def pair() -> tuple[bytes, bytes]:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    return (
        private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()),
        private.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo),
    )


@pytest.mark.parametrize("kind", ["hmac", "ed25519"])
def test_a_signature_fixes_every_field(kind: str) -> None:
    secret, public = (b"k" * 32, b"k" * 32) if kind == "hmac" else pair()
    certificate = make()
    assert certificate.verify_signature(load_key(public)) is None
    signed = Certificate.from_json(certificate.sign(load_key(secret)).to_json())
    assert signed.verify_signature(load_key(public)) is True
    assert signed.hash == certificate.hash and recompute(signed).ok
    assert signed.verify_signature(HmacKey(b"another key of 32 bytes, or so.")) is False
    data = json.loads(signed.to_json())
    for name, value in data.items():
        if name in ("thrifty_certificate", "procedure", "bound", "signature"):
            continue
        changed: Any = {
            str: "hoeffding-bentkus" if name == "bound" else "disagree" if name == "loss" else f"{value}x",
            float: 0.123,
            int: 7,
            list: ["x"] if name == "groups" else [],
            dict: {"x": "y"} if name in ("engines", "versions") else None,
            type(None): 0.5,
        }[type(value)]
        other = Certificate.from_dict({**data, name: changed})
        assert other.verify_signature(load_key(public)) is False, name


def test_a_public_key_cannot_sign() -> None:
    with pytest.raises(InvalidInput, match="cannot sign"):
        make().sign(load_key(pair()[1]))


# -- examples and revocation -------------------------------------------------------------------------------------


def test_the_examples_are_those_that_were_used() -> None:
    certificate = make()
    assert check_data(certificate, TASKS) == []  # the whole file, cut again
    assert check_data(certificate, TASKS[::-1]) == []
    assert check_data(certificate, PARTS.calibration) == []
    changed = [replace(TASKS[0], gold="2"), *TASKS[1:]]
    for tasks in (changed, TASKS[1:], PARTS.search):
        assert "not those that were used" in check_data(certificate, tasks)[0]
    other = replace(certificate, split=SplitUsed(data_hash(TASKS), (0.3, 0.5, 0.2), 5))
    assert "cut as the certificate says" in check_data(other, TASKS)[0]
    moved = replace(certificate, groups=tuple(f"x{i:02}" for i in range(N)))
    assert "other groups" in check_data(moved, PARTS.calibration)[0]


def test_revoked_once_and_for_all(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    certificate = make()
    certificate.save(path)
    assert revocation_of(path, certificate.hash) is None
    first = revoke(path, Revocation(certificate.hash, "2026-11-25", "drift", 40, 0.5, 33.0))
    assert (
        revoke(path, Revocation(certificate.hash, "2026-11-26", "again"))
        == first
        == revocation_of(path, certificate.hash)
    )
    assert Certificate.load(path) == certificate  # itself unchanged
    other = replace(certificate, date="2026-12-01")
    assert revocation_of(path, other.hash) is None
    second = revoke(path, Revocation(other.hash, "2026-12-02", "drift"))
    assert revocation_of(path, other.hash) == second
    revocation_path(path).write_text("{")
    broken = revocation_of(path, certificate.hash)
    assert broken is not None and "cannot be read" in broken.reason
