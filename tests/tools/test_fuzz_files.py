"""The fuzzer of files: a part of it, and that it notices a loader that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from bnfuse.checkpoint import files
from fuzz.files import DAMAGES, try_files


def test_damaged_files_are_refused_or_load_what_was_saved() -> None:
    counts, failures = try_files(450)
    assert not failures
    refused = {kind for kind, found in counts if found == "refused"}
    assert refused == {damage.__name__ for damage in DAMAGES}


def test_a_loader_that_does_not_check_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_hash", lambda tensors: "the same for all")
    counts, failures = try_files(90)
    assert any("wrong" in failure for failure in failures), counts


def test_a_half_loaded_model_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    check = files._check_tensors

    def late(own: dict[str, Any], content: Any) -> None:
        own["steps"].add_(1)
        check(own, content)

    monkeypatch.setattr(files, "_check_tensors", late)
    _, failures = try_files(90)
    assert any("the model has changed" in failure for failure in failures)
