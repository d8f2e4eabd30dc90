"""The one rule by which an implementation is chosen, and the table that `env` prints of it."""

from __future__ import annotations

import importlib

import pytest

from fastsimgan.env import OPS
from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.ops._dispatch import RACED, Dispatch

MISSING = {"fast": None, "faster": "no such unit", "raced": None}
OP = Dispatch("op", lambda: MISSING, {"cpu": ("faster", "fast"), "cuda": ("raced", RACED)})


def choose(impl: str, unmet: str | None = None) -> str:
    return OP.choose(impl, ("faster", "fast"), lambda name: MISSING[name] or unmet)


def test_auto_takes_the_first_that_can_serve_and_else_the_reference() -> None:
    assert choose("auto") == "fast"
    assert choose("auto", "an odd shape") == "reference"
    assert OP.choose("auto", (), lambda name: None) == "reference"


def test_what_is_asked_for_by_name_is_given_or_refused_with_the_reason() -> None:
    assert choose("fast") == "fast" and choose("reference", "an odd shape") == "reference"
    with pytest.raises(UnavailableError, match="^op impl='faster': no such unit$"):
        choose("faster")
    with pytest.raises(UnavailableError, match="^op impl='fast': an odd shape$"):
        choose("fast", "an odd shape")
    with pytest.raises(InputError, match="^impl must be one of auto, fast, faster, raced, reference, got 'other'$"):
        choose("other")


def test_the_table_says_what_can_run_and_what_auto_takes() -> None:
    assert OP.implementations() == {**MISSING, "reference": None}
    assert OP.table(("cpu", "cuda")) == [
        ("fast", "can run"),
        ("faster", "no such unit"),
        ("raced", "can run"),
        ("reference", "can run"),
        ("on cpu", "fast"),
        ("on cuda", RACED),
    ]
    unraced = Dispatch("op", lambda: {"raced": "no CUDA device"}, OP.automatic)
    assert unraced.table(("cuda",))[-1] == ("on cuda", "reference")


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_dispatch_of_its_name(name: str) -> None:
    op = importlib.import_module(f"fastsimgan.ops.{name}")
    assert op.DISPATCH.op == name and op.implementations() == op.DISPATCH.implementations()
    known = {*op.implementations(), RACED}
    assert all(set(preferred) <= known for preferred in op.DISPATCH.automatic.values())
