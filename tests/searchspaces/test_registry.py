"""The registry: a file is a component, and a name means one thing."""

import sys
from importlib.metadata import EntryPoint

import pytest

from ir.component import KINDS, Component
from ir.errors import InputError
from searchspaces.registry import (
    ENTRY_POINT_GROUP,
    Registry,
    RegistryError,
    UnknownComponent,
    default_options,
    default_registry,
)
from tests.searchspaces import fakes

NORM = """
from ir.component import Norm, option

class {name}(Norm):
    aliases = {aliases}
    eps: float = option(1e-5, minimum=0.0, doc="Added.")

    def build(self, b, x):
        return x

    def reference(self, params, x):
        return x
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Give `add(file, text)`, which writes a component file, and `.registry()` over what was written."""
    name = f"package_{tmp_path.name.replace('-', '_')}"
    monkeypatch.syspath_prepend(tmp_path)

    class Package:
        def add(self, path, text):
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

        def registry(self, *entry_points):
            points = tuple(EntryPoint(key, value, ENTRY_POINT_GROUP) for key, value in entry_points)
            return Registry(tmp_path / name, name, points)

    yield Package()
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


def test_file_in_the_folder_is_a_component(package):
    """Adding a file is all it takes."""
    package.add("norms/scale_norm.py", NORM.format(name="ScaleNorm", aliases={}))
    package.add("norms/_helper.py", "raise RuntimeError('private files are no components')")
    registry = package.registry()
    assert registry.keys("norm") == ("scale_norm",)
    assert registry.get("norm", "scale_norm").__name__ == "ScaleNorm"
    assert registry.components("norm") == {"scale_norm": registry.get("norm", "scale_norm")}


def test_lookup_imports_only_the_file_asked_for(package):
    """A broken neighbour does not matter to whoever asks for another key."""
    package.add("norms/scale_norm.py", NORM.format(name="ScaleNorm", aliases={}))
    package.add("norms/broken.py", "raise RuntimeError('imported')")
    assert package.registry().get("norm", "scale_norm").key() == "scale_norm"


def test_alias_leads_to_component_and_preset(package):
    """An alias is a name with options already set."""
    package.add("norms/scale_norm.py", NORM.format(name="ScaleNorm", aliases={"exact": {"eps": 0.0}}))
    entry = package.registry().lookup("norm", "exact")
    assert (entry.key, dict(entry.preset)) == ("scale_norm", {"eps": 0.0})


def test_alias_equal_to_a_key_names_both_files(package):
    """Two meanings of a name are an error that tells where both come from."""
    package.add("norms/first.py", NORM.format(name="First", aliases={"second": {}}))
    package.add("norms/second.py", NORM.format(name="Second", aliases={}))
    with pytest.raises(RegistryError) as caught:
        package.registry().names("norm")
    assert "norms/first.py" in (caught.value.found or "")
    assert "norms/second.py" in (caught.value.found or "")


def test_alias_given_twice_names_both_files(package):
    """So are two components with the same alias."""
    package.add("norms/first.py", NORM.format(name="First", aliases={"short": {}}))
    package.add("norms/second.py", NORM.format(name="Second", aliases={"short": {}}))
    with pytest.raises(RegistryError, match="`short`") as caught:
        package.registry().aliases("norm")
    assert "norms/first.py" in (caught.value.found or "")
    assert "norms/second.py" in (caught.value.found or "")


def test_entry_point_adds_a_component(package):
    """An installed package offers components by its entry points."""
    registry = package.registry(("norm.theirs", "tests.searchspaces.fakes:RmsNorm"))
    assert registry.get("norm", "theirs") is fakes.RmsNorm


def test_entry_point_with_a_taken_key_names_file_and_package(package):
    """A third party cannot silently replace a component."""
    package.add("norms/scale_norm.py", NORM.format(name="ScaleNorm", aliases={}))
    registry = package.registry(("norm.scale_norm", "tests.searchspaces.fakes:RmsNorm"))
    with pytest.raises(RegistryError) as caught:
        registry.get("norm", "scale_norm")
    assert "norms/scale_norm.py" in (caught.value.found or "")
    assert "tests.searchspaces.fakes:RmsNorm" in (caught.value.found or "")


def test_two_entry_points_of_one_key_are_an_error(package):
    """Nor can two third parties share a key."""
    registry = package.registry(("norm.theirs", "a:A"), ("norm.theirs", "b:B"))
    with pytest.raises(RegistryError) as caught:
        registry.keys("norm")
    assert caught.value.found == "a:A and b:B"


@pytest.mark.parametrize("name", ["theirs", "norms.theirs", "norm."])
def test_entry_point_without_kind_is_an_error(package, name):
    """The name of an entry point tells kind and key."""
    with pytest.raises(RegistryError, match="bad entry point"):
        package.registry((name, "a:A")).keys("norm")


def test_entry_point_to_something_else_is_an_error(package):
    """What it leads to must be a component class."""
    registry = package.registry(("norm.theirs", "tests.searchspaces.fakes:registry"))
    with pytest.raises(RegistryError, match="not a component"):
        registry.get("norm", "theirs")


@pytest.mark.parametrize("text", ["", NORM.format(name="A", aliases={}) + NORM.format(name="B", aliases={})])
def test_file_with_none_or_two_components_is_an_error(package, text):
    """A file is one component."""
    package.add("norms/odd.py", text)
    with pytest.raises(RegistryError, match="one component"):
        package.registry().get("norm", "odd")


def test_unknown_name_suggests_the_closest():
    """A misspelt alias or key gets a suggestion."""
    with pytest.raises(UnknownComponent) as caught:
        fakes.registry().lookup("token_mixer", "softmax_atention")
    assert caught.value.hint == "did you mean 'softmax_attention'?"
    assert isinstance(caught.value, InputError)


def test_default_options_leave_out_what_context_fills():
    """Causality and position belong to the model around a mixer."""
    assert set(default_options(fakes.SoftmaxAttention)) == {"num_heads", "num_kv_heads", "window", "qk_norm"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_shipped_component_loads_under_its_key(kind):
    """Each file holds a component of its folder's kind; names and aliases never clash."""
    registry = default_registry()
    for key, component in registry.components(kind).items():
        assert issubclass(component, Component)
        assert (component.kind, component.key()) == (kind, key)
    assert len(set(registry.names(kind))) == len(registry.names(kind))
