"""The Jinja environment that transformers gives to chat templates, without transformers.

A template comes with a model, from people we do not know. So the sandbox is the strict one: a
template reads what it is given and can change or reach nothing else. In addition to what
transformers does, a template must give the same text each time: the date is that of the run's
start, and what draws at random is refused.

The text of messages goes through a template as `Traced` strings. Here are the places where Jinja
makes new strings out of old ones; each of them keeps track of what came from outside.
"""

import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from oel_jax.base.errors import UserError
from oel_jax.chat.traced import Traced, generated, joined, outside, reached, text_of

# A template is a program: whatever it runs into is its own mistake.
_MISTAKES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
# Filters that give back what they are given, or parts of it.
_SELECTING = frozenset(
    "attr batch count d default dictsort first groupby items last length list map max min reject "
    "rejectattr reverse select selectattr slice sort sum unique".split()
)

# Filters whose text is made by methods of `Traced`, character by character.
_EXACT = frozenset(("join", "replace", "string", "trim"))


class Renderer:
    """A compiled chat template.

    Attributes:
        marks_answers: the template has `{% generation %}` blocks.
    """

    def __init__(self, template: str, special_texts: Mapping[str, str], today: datetime.datetime):
        """Compiles a template.

        Args:
            template: Jinja source of a Hugging Face chat template.
            special_texts: `bos_token` and the like, variables of the template.
            today: what `strftime_now` shows, in local time as in transformers.

        Raises:
            UserError: the source is not Jinja.
        """
        environment = _Environment(today)
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise UserError(f"chat_template fails to compile: {error}") from error
        self._specials = dict(special_texts)
        self.marks_answers = environment.generation_blocks > 0

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool,
        thinking: bool | None,
    ) -> str:
        """The rendered text; what came from `Traced` strings of the arguments is traced.

        Raises:
            UserError: the template fails for these messages.
        """
        mode = {} if thinking is None else {"enable_thinking": thinking}
        context = self._template.new_context(
            {
                **self._specials,
                **mode,
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        try:
            return joined(self._template.root_render_func(context))
        except _MISTAKES as error:
            what = "one user message" if _is_lone(messages) else f"{len(messages)} messages"
            raise UserError(f"chat_template fails for {what}: {error}") from error


def _is_lone(messages: Sequence[Mapping[str, Any]]) -> bool:
    return [message["role"] for message in messages] == ["user"]


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        """`a ~ b`: through the environment, since Jinja's function joins plain strings."""
        self.write("environment.join_texts((")
        for inner in node.nodes:
            self.visit(inner, frame)
            self.write(", ")
        self.write("))")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    concat = staticmethod(joined)
    intercepted_binops = frozenset("%")

    def __init__(self, today: datetime.datetime):
        self.generation_blocks = 0
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=text_of,
        )
        self.filters |= {"tojson": _tojson, "random": _refuse_chance, "join": _join}
        self.filters |= {"string": text_of}
        self.filters = {
            name: function if name in _SELECTING | _EXACT else _tracing(function)
            for name, function in self.filters.items()
        }
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": today.strftime,
            "dict": _Dict(),
            "namespace": _Namespace,
            "lipsum": _refuse_chance,
        }

    def join_texts(self, values: Iterable[Any]) -> str:
        return joined(map(text_of, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        made = super().call_binop(context, operator, left, right)
        return outside(made, (left, right)) if type(made) is str else made

    def call(self, context: Any, function: Any, /, *values: Any, **named: Any) -> Any:
        """A call in a template. A method of a plain string takes traced ones as well."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            values = tuple(list(v) if isinstance(v, Iterator) else v for v in values)
        if type(owner) is str and any(reached((values, named))):
            traced = Traced(owner, "\0" * len(owner))
            function = getattr(traced, getattr(function, "__name__", ""), function)
        made = super().call(context, function, *values, **named)
        # A macro's text is traced already; methods of containers give what is in them.
        exact = isinstance(function, jinja2.runtime.Macro) or _holds(owner)
        return made if exact or type(made) is not str else outside(made, (owner, values, named))


def _holds(owner: Any) -> bool:
    return isinstance(owner, Mapping | list | tuple)


def _tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes strings: what it makes of outside text is outside text."""

    @wraps(function)
    def filtered(*values: Any, **named: Any) -> Any:
        values = tuple(list(v) if isinstance(v, Iterator) else v for v in values)
        made = function(*values, **named)
        return outside(made, (values, named)) if isinstance(made, str) else made

    return filtered


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, values: Iterable[Any], d: Any = "", attribute: Any = None
) -> str:
    """The filter `join`, which keeps track of each part."""
    if attribute is not None:
        values = map(jinja2.filters.make_attrgetter(environment, attribute), values)
    return joined(map(text_of, values), text_of(d))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks an assistant's words."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        self.environment.generation_blocks += 1
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: what is set inside is not seen outside.
        call = self.call_method("_marked")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return generated(caller())


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)`, and nothing else of the class."""

    def __call__(self, *pairs: Any, **items: Any) -> dict[Any, Any]:
        return dict(*pairs, **items)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` without names that begin with `_`, which could reach Python's insides."""

    def __init__(*pairs: Any, **items: Any) -> None:
        # `self` has no name, so that a template may write namespace(self=...).
        own, pairs = pairs[0], pairs[1:]
        values = dict(*pairs, **items)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(own, values)

    def __setitem__(self, name: Any, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace cannot have the attribute {name!r}; rename it"
        )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _refuse_chance(*_: Any, **__: Any) -> None:
    raise jinja2.TemplateError(
        "it draws at random (random, lipsum), but all prompts of a run must be alike"
    )
