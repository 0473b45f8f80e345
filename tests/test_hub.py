"""Without network the Hub's client is told so, and afterwards it is as it was."""

from __future__ import annotations

import socket

import pytest

from mvision.storage import hub


def test_unreachable_means_cache_only(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for reachable in (True, False):
        monkeypatch.setattr(hub, "_reachable", lambda url, answer=reachable: answer)
        inside = hub.cache_only_if_unreachable()
        inside.__enter__()
        assert constants.HF_HUB_OFFLINE is not reachable
        inside.__exit__(None, None, None)
        assert constants.HF_HUB_OFFLINE is False


def test_offline_by_wish_stays_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_reachable", lambda url: True)
    with hub.cache_only_if_unreachable():
        assert constants.HF_HUB_OFFLINE is True


def test_reachable_is_what_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "getproxies", dict)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert not hub._reachable(f"http://127.0.0.1:{port}", timeout=1)
        server.listen()
        assert hub._reachable(f"http://127.0.0.1:{port}", timeout=1)
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub._reachable("https://host.invalid")


def test_reasons_are_short() -> None:
    from huggingface_hub.utils import LocalEntryNotFoundError

    assert hub.download_problem(LocalEntryNotFoundError("long")) == "not in the cache, and the Hub cannot be reached"
    assert hub.download_problem(RuntimeError("a\n b")) == "a b"
    assert hub.download_problem(RuntimeError()) == "RuntimeError"
