"""The Jinja environment that transformers gives to chat templates, without transformers.

A template comes with a model, from people we do not know. So the sandbox is the strict one: a
template reads what it is given and can change or reach nothing else. In addition to what
transformers does, a template must give the same text each time: the date is that of the run's
start, and what draws at random is refused.
"""

import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils

from oel_jax.errors import UserError

Render = Callable[[str, bool], str]

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


def renderer(template: str, special_texts: Mapping[str, str], today: datetime.datetime) -> Render:
    """A function that renders `template` for (one user message, thinking on).

    Args:
        template: Jinja source of a Hugging Face chat template.
        special_texts: `bos_token` and the like, variables of the template.
        today: what `strftime_now` shows, in local time as in transformers.

    Raises:
        UserError: the source is not Jinja; later, the template fails for the message.
    """
    try:
        compiled = _environment(today).from_string(template)
    except jinja2.TemplateError as error:
        raise _failure(error) from error

    def render(content: str, thinking: bool) -> str:
        try:
            return compiled.render(
                messages=[{"role": "user", "content": content}],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **{**special_texts, "enable_thinking": thinking},
            )
        except _MISTAKES as error:
            raise _failure(error) from error

    return render


def _failure(error: Exception) -> UserError:
    return UserError(f"chat_template fails for one user message: {error}")


def _environment(today: datetime.datetime) -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters |= {"tojson": _tojson, "random": _refuse_chance}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": today.strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
        "lipsum": _refuse_chance,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks an assistant's words, for training only."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A separate scope, as in transformers: what is set inside is not seen outside.
        return jinja2.nodes.Scope(body).set_lineno(line)


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
