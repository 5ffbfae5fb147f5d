"""A handle gives a host its own objects back."""

import types

import pytest

from fastrl.integrations.handle import Handle, check_version


def host():
    return types.SimpleNamespace(head=object(), loss=object())


def test_undo_gives_back_the_very_objects_and_removes_what_was_not_there():
    module, handle = host(), Handle("host")
    head, loss = module.head, module.loss
    handle.replace(module, "head", "ours")
    handle.replace(module, "head", "ours again")
    handle.replace(module, "fresh", "ours")
    handle.undo()
    assert module.head is head
    assert module.loss is loss
    assert not hasattr(module, "fresh")


def test_a_second_undo_does_nothing():
    module, handle, calls = host(), Handle("host"), []
    handle.replace(module, "head", "ours")
    handle.on_undo(lambda: calls.append("once"))
    handle.undo()
    module.head = "theirs"
    handle.undo()
    assert module.head == "theirs"
    assert calls == ["once"]


def test_a_block_ends_with_undo_also_when_it_fails():
    module = host()
    head, handle = module.head, Handle("host")
    handle.replace(module, "head", "ours")
    with pytest.raises(KeyError), handle:
        raise KeyError
    assert module.head is head


def test_what_somebody_replaced_since_is_not_overwritten():
    module, handle = host(), Handle("host")
    handle.replace(module, "head", "ours")
    handle.replace(module, "loss", "ours")
    module.head = "theirs"
    with pytest.raises(RuntimeError, match="host: head: expected fastrl's own object, got 'theirs'"):
        handle.undo()
    assert module.head == "theirs"
    assert module.loss == "ours"


def test_a_version_outside_what_was_tested_is_said_once_and_a_missing_package_is_an_import_error():
    with pytest.warns(UserWarning, match=r"torch .* is installed; tested were 99 up to, not including, 100") as said:
        check_version("torch", "99", "100")
    assert len(said) == 1
    with pytest.raises(ImportError, match="no-such-host: expected an installed package, got none"):
        check_version("no-such-host", "1", "2")
