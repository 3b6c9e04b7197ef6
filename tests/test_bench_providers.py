"""How another library joins."""

from __future__ import annotations

import pytest
from small_session import options_for

from fastlora.bench import (
    providers,
)
from fastlora.bench.providers import PROVIDERS, Provider, find


@pytest.fixture(autouse=True)
def same_providers():
    """Leave the providers as they were."""
    before = dict(PROVIDERS)
    yield
    PROVIDERS.clear()
    PROVIDERS.update(before)


def test_a_name_is_registered_once():
    mine = Provider("mine", "for a test")
    providers.register(mine)
    assert find("mine") is mine
    assert options_for(providers=["mine"]).providers_for("layer", 0.1)[1] is mine
    with pytest.raises(ValueError, match="there is a provider 'mine' already"):
        providers.register(Provider("mine", "another"))
    with pytest.raises(ValueError, match="there is a provider 'peft' already"):
        providers.register(Provider("peft", "another"))


def test_a_provider_is_loaded_from_a_module(tmp_path, monkeypatch):
    (tmp_path / "their_lora.py").write_text(
        "from fastlora.bench.providers import Provider\n"
        "fast = Provider('theirs', 'for a test')\nslow = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    provider = providers.load("their_lora:fast")
    assert (provider.name, find("theirs")) == ("theirs", provider)
    with pytest.raises(ValueError, match="there is a provider 'theirs' already"):
        providers.load("their_lora:fast")
    with pytest.raises(ValueError, match="'their_lora:slow' is a int, not a fastlora"):
        providers.load("their_lora:slow")


@pytest.mark.parametrize(
    "path",
    [
        "no_such_module:name",
        "fastlora.bench.providers:no_such_name",
        "fastlora.bench.providers",
        pytest.param(
            ".bench:name",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_its_name(path):
    with pytest.raises(
        ValueError, match=f"'{path}' cannot be imported .package.module:name, on PYTHONPATH.: "
    ):
        providers.load(path)


def test_a_provider_of_somebody_else_s_cannot_pass_for_fastlora(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "from fastlora.bench.providers import Provider\nfast = Provider('fastlora-2', '')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="is called 'fastlora-2', as fastlora's own providers are"):
        providers.load("theirs:fast")
    assert "fastlora-2" not in PROVIDERS
