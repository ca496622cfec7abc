"""Builder, graph, interpreter, initial values, components and errors."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import numpy as np
import pytest

from ir.builder import Builder, Tensor
from ir.component import Norm, context_option, option
from ir.cost import profile
from ir.errors import GraphError, NasError, SpaceError, did_you_mean
from ir.initializers import INITIALIZERS, draw, initialize
from ir.interpret import evaluate
from ir.op import Array, broadcast_shapes, snake_case
from ir.ops.structure import Constant, Parameter
from ir.types import Axis, TensorType
from tests.ir.models import decoder, recurrence
from tests.ir.random_graphs import draw_values


def test_builder_names_parameters_by_scope():
    """Scopes nest, empty ones vanish, and nodes carry their path."""
    b = Builder()
    with b.scope("layers.0"), b.scope(""), b.scope("mixer"):
        y = b.linear(b.input("x", (2, 3)), "up", (Axis("hidden", 5),), bias=True)
    graph = b.build(y=y)
    assert list(graph.parameters) == ["layers.0.mixer.up", "layers.0.mixer.up_bias"]
    assert graph.nodes[-1].path == f"layers.0.mixer/add_{graph.nodes[-1].id}"


def test_builder_refuses_a_parameter_twice_and_shares_on_demand():
    """A name defines once; `shared` reads it again."""
    b = Builder()
    weight = b.parameter("w", ((Axis("d", 2),),))
    with pytest.raises(GraphError, match="defined twice"):
        b.parameter("w", ((Axis("d", 2),),))
    assert b.shared("w") is weight
    with pytest.raises(GraphError, match="no such parameter"):
        b.shared("v")


def test_builder_refuses_values_of_another_builder():
    """Two graphs under construction do not mix."""
    first, second = Builder(), Builder()
    with pytest.raises(GraphError, match="another builder"):
        second.exp(first.input("x", (2,)))


def test_builder_errors_name_the_place():
    """A shape error says in which scope and operation."""
    b = Builder()
    with (
        b.scope("layers.3.mixer"),
        pytest.raises(GraphError, match=r"layers.3.mixer/matmul: matmul inner sizes differ"),
    ):
        b.matmul(b.input("x", (2, 3)), b.input("y", (4, 3)))


def test_tensor_arithmetic_follows_python():
    """Numbers on either side become constants."""
    b = Builder()
    x = b.input("x", (2,))
    graph = b.build(y=(1.0 - x) * 2.0 / (x + 3.0) + -x)
    x_value = np.array([0.5, -2.0])
    assert evaluate(graph, {"x": x_value}, {})["y"].tolist() == ((1 - x_value) * 2 / (x_value + 3) - x_value).tolist()


@pytest.mark.parametrize("make", [decoder, recurrence])
def test_graph_pickles(make):
    """A graph whose derived tables were used crosses process boundaries whole."""
    graph = make()
    assert graph.inputs
    assert graph.parameters
    back = pickle.loads(pickle.dumps(graph))
    assert (back.nodes, back.outputs, back.name) == (graph.nodes, graph.outputs, graph.name)


def test_graph_knows_users_and_live_nodes():
    """A value's readers are listed once each; what no output needs is not live."""
    b = Builder()
    x = b.input("x", (2,))
    y = x * x
    dead = b.exp(x)
    graph = b.build(y=y)
    assert [node.op.name for node in graph.users(x.value)] == ["mul", "exp"]
    assert graph.live == {x.value.node, y.value.node}
    assert dead.value.node not in graph.live
    assert graph.to_networkx().number_of_edges() == 2


def test_interpreter_names_what_is_missing_or_wrong():
    """A missing input, another shape and another dtype are errors that name it."""
    graph = decoder()
    inputs, params = draw_values(graph)
    with pytest.raises(GraphError, match="input 'tokens' is missing"):
        evaluate(graph, {}, params)
    with pytest.raises(GraphError, match=r"expected: \(2, 5\)"):
        evaluate(graph, {"tokens": np.zeros((2, 4), np.int32)}, params)
    with pytest.raises(GraphError, match="another dtype"):
        evaluate(graph, {"tokens": np.zeros((2, 5))}, params)
    with pytest.raises(GraphError, match=r"parameter 'embed.table' is missing"):
        evaluate(graph, inputs, {})


def test_interpreter_computes_in_the_dtype_asked_for():
    """float64 by default whatever the graph says; float32 differs from it by rounding only."""
    graph = decoder()
    inputs, params = draw_values(graph)
    exact, single = (evaluate(graph, inputs, params, dtype=dtype)["logits"] for dtype in (np.float64, np.float32))
    assert (exact.dtype, single.dtype) == (np.float64, np.float32)
    # float32 has 24 bits; two layers of sums over at most 16 terms lose a few of them.
    np.testing.assert_allclose(single, exact, atol=1e-5 * np.abs(exact).max())
    assert np.any(single != exact)


def test_initial_values_depend_on_seed_and_name_only():
    """Adding a layer leaves the values of the others; another seed changes them."""
    small, large = initialize(decoder(1), 0), initialize(decoder(3), 0)
    assert set(small) < set(large)
    assert all(np.array_equal(small[name], large[name]) for name in small)
    assert not np.array_equal(initialize(decoder(1), 1)["layers.0.mixer.q"], small["layers.0.mixer.q"])
    assert all(value.dtype == np.float32 for value in small.values())
    assert sum(value.size for value in large.values()) == profile(decoder(3)).params


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initial_distribution_gives_its_shape(name: str):
    """Every named distribution draws finite values of the parameter's shape."""
    arguments = {
        "normal": "(0.5)",
        "uniform": "(-1, 2)",
        "constant": "(3)",
        "taps": "(2, 1)",
        "softplus_inverse_log_uniform": "(0.001, 0.1)",
    }
    parameter = Parameter("w", ((Axis("d", 40),), (Axis("a", 5), Axis("b", 10))), name + arguments.get(name, ""))
    value = draw(parameter, 0)
    assert value.shape == (40, 50)
    assert np.all(np.isfinite(value))
    expected = {"fan_in": (0, 40**-0.5), "normal": (0, 0.5), "uniform": (0.5, 3 / 12**0.5), "constant": (3, 0)}
    if name in expected:
        mean, deviation = expected[name]
        # 2000 draws: the mean lies within 5 standard errors, the deviation within a tenth.
        assert abs(value.mean() - mean) <= 5 * deviation / 2000**0.5
        assert abs(value.std() - deviation) <= deviation / 10


@pytest.mark.parametrize("text", ["normall(1)", "normal", "normal(1, 2)", "normal(x)", "normal(1", "__import__('os')"])
def test_initial_distribution_is_a_closed_list(text: str):
    """Anything but a known name with the right numbers is refused."""
    with pytest.raises(GraphError):
        draw(Parameter("w", ((Axis("d", 2),),), text), 0)


class Example(Norm):
    """A component for these tests."""

    width: int = option(4, minimum=1, maximum=8)
    shape: str = option("round", choices=("round", "square"))
    causal: bool = context_option(True)

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return x

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return x


def test_component_options_are_checked_and_filled_from_context():
    """Values out of range or misspelt are refused by name; context fills what is not given."""
    assert Example.key() == "example"
    assert Example.create({"width": 2}, {"causal": False, "width": 3, "other": 1}) == Example(2, "round", False)
    assert Example(2, "round", True).options() == (("width", 2),)
    for options, message in (
        ({"wdith": 2}, "did you mean 'width'"),
        ({"width": 0}, "at least 1"),
        ({"width": 9}, "at most 8"),
        ({"shape": "oval"}, "among the choices"),
    ):
        with pytest.raises(GraphError, match=message):
            Example.create(options)


def test_errors_say_where_expected_found_and_hint_and_pickle():
    """The text holds every part, and an error crosses process boundaries whole."""
    error = SpaceError("heads do not divide", where="space.yaml:7", expected="a divisor of 8", found="3", hint="use 2")
    text = "space.yaml:7: heads do not divide\n  expected: a divisor of 8\n  found: 3\n  hint: use 2"
    back = pickle.loads(pickle.dumps(error))
    assert str(error) == str(back) == text
    assert isinstance(back, SpaceError)
    assert (NasError.exit_code, SpaceError.exit_code) == (1, 2)
    assert did_you_mean("mambo", ["mamba", "mlp"]) == "did you mean 'mamba'?"
    assert did_you_mean("xyz", ["mamba"]) is None


def test_types_refuse_what_is_no_shape():
    """Sizes are positive whole numbers and dtypes come from a list."""
    for shape in ((0,), (-1,), (True,), (2.0,)):
        with pytest.raises(GraphError):
            TensorType(shape)  # type: ignore[arg-type]
    with pytest.raises(GraphError):
        TensorType((2,), "float64")
    with pytest.raises(GraphError):
        Axis("d", 0)
    assert str(TensorType((2, 3), "bfloat16")) == "bfloat16[2, 3]"
    assert TensorType((2, 3), "bfloat16").size_bytes == 12


@pytest.mark.parametrize(("shapes", "expected"), [(((2, 1), (3,)), (2, 3)), (((), (4,)), (4,)), (((), ()), ())])
def test_shapes_broadcast_as_in_numpy(shapes: tuple[tuple[int, ...], ...], expected: tuple[int, ...]):
    """Missing axes and axes of size one stretch."""
    assert broadcast_shapes(*shapes) == expected == np.broadcast_shapes(*shapes)


def test_names_follow_classes():
    """Class names become snake_case, acronyms in one piece."""
    assert [snake_case(name) for name in ("GatedLinearAttention", "GLU", "Conv")] == [
        "gated_linear_attention",
        "glu",
        "conv",
    ]


def test_constants_are_stored_narrow():
    """float64 becomes float32, int64 becomes int32, bool stays."""
    kinds = [Constant.from_array(np.asarray(value)).type.dtype for value in (1.5, 3, True)]
    assert kinds == ["float32", "int32", "bool"]
