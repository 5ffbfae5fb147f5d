from __future__ import annotations

import socket
import threading

import pytest
from huggingface_hub import constants

from fastrl import hub
from fastrl.data.sources import read_rows
from fastrl.model.load import load_model


def test_a_server_answers_where_one_listens_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(hub, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=server.accept, daemon=True).start()
        assert hub.answers(f"http://127.0.0.1:{port}")
    assert not hub.answers(f"http://127.0.0.1:{port}")
    assert not hub.answers("https://no-such-host.invalid")
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
    assert hub.answers("https://no-such-host.invalid")


def test_libraries_are_offline_only_inside_and_only_without_a_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for reachable in (True, False):
        monkeypatch.setattr(hub, "answers", lambda url, reachable=reachable: reachable)
        with hub.or_cache("someone/model"):
            assert constants.HF_HUB_OFFLINE is not reachable
        with hub.or_cache(str(tmp_path)):
            assert constants.HF_HUB_OFFLINE is False
        assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    "load", [load_model, lambda name: read_rows(name, size=1, seed=0, options={})], ids=["a model", "a dataset"]
)
def test_a_name_that_is_nowhere_is_refused_without_asking_the_hub_again_and_again(monkeypatch, load):
    asked = []
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", lambda *address, **_: asked.append(address) or refuse())
    with pytest.raises(ValueError, match=r"that can be reached.*nobody/nothing"):
        load("nobody/nothing")
    assert len(asked) == 1


def refuse():
    raise OSError("no network")
