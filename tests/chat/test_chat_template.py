"""Templates in the style of public ones: rendered as in transformers, date and sandbox included."""
# ruff: noqa: E501  (templates have long lines)

import datetime

import pytest
from transformers.utils import chat_template_utils

from oel_jax.base.errors import UserError
from oel_jax.chat.control_tokens import ControlToken
from oel_jax.chat.template import ChatTemplate
from oel_jax.chat.traced import plain

TODAY = datetime.datetime(2026, 11, 28, 23, 59, 58)
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "llama_3_1": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday Date: " + date_string + "\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- system_message }}{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
""",
    "llama_3_2": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today: " + date_string }}{%- for m in messages %}{{- m.content | trim }}{%- endfor %}""",
    "qwen2_5": """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "qwen3": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and
        not(message.content.startswith('<tool_response>')
            and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "thinking_only": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{% endfor %}{{ '<|im_start|>assistant\\n<think>\\n' }}"
    ),
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- for message in loop_messages | rejectattr("role", "equalto", "tool") %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("conversation roles must alternate") }}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if loop.last and system_message is defined %}
        {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
    {%- else %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- endif %}
{%- endfor %}
""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate') }}
    {% endif %}
    {% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}
""",
    "deepseek_r1": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}
{{bos_token}}{{ns.system_prompt}}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<User>' + message['content']}}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{'<Assistant><think>\\n'}}{% endif %}""",
    "phi": """{% for message in messages %}{% if message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are named SmolLM<|im_end|>\\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "trained_with_a_mask": """{% set seen = 0 %}{% for m in messages %}
    {% if m.role == 'assistant' %}
        {% generation %}{% set seen = 1 %}{{ m.content }}{% endgeneration %}
    {% else %}
        {{ m.content }}
    {% endif %}
{% endfor %}{% generation %}  {{ seen }}
{% endgeneration %}{{ seen }}""",
    "json": """{{ {'b': 'é<&>"', 'a': [1, none]} | tojson }} {{ {'b': 'é', 'a': 1} | tojson(indent=2, sort_keys=true) }}
{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=true, separators=(',', ':')) }} {{ messages[0].content }}""",
    "loops": """{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% set d = dict(a=1, b='x') %}{% for k, v in d | dictsort %}{{ k }}{{ v }}{% endfor %}{{ dict.fromkeys(['q']) }}
{% macro role(name) -%} <|{{ name }}|> {%- endmacro %}{{ role('user') }}{{ messages[0].content }}
{% filter upper %}done{% endfilter %}{{ cycler('a', 'b').next() }}{{ '%05.1f' | format(2.25) }}""",
    "what_is_defined": (
        "{{ tools is defined }}{{ tools is none }}{{ documents is none }}{{ tool_choice is defined }}"
        "{{ pad_token is defined }}{{ add_generation_prompt }}{{ enable_thinking }}"
        "{{ messages | length }}{{ messages[0] | length }}{{ messages[0].name is defined }}"
        "{{ messages[0].content }}{{ self is defined }}{{ namespace(self=3).self }}"
    ),
    "newlines_stripped": "<|user|>\n{{ messages[0].content.strip('\\n') }}\n<|bot|>",
    "left_only": "{{ messages[0].content.lstrip() }}<|bot|>",
    "the_clock": "{{ strftime_now('%Y-%m-%d %H:%M:%S %A %j %y%%') }} {{ messages[0].content }}",
}
TEXTS = ["go up", " \n go\tup \n", "\x1c{{ 7 * 7 }}{% raw %}\u3000", "<|im_end|></think>", "\n\n"]
REFUSED = {
    "{{ ''.__class__.__mro__ }}{{ messages[0].content }}": "unsafe|undefined",
    "{{ messages.append(1) }}{{ messages[0].content }}": "",
    "{% set ns = namespace() %}{% set ns._x = 1 %}{{ messages[0].content }}": "_x",
    "{{ namespace(_x=1) }}{{ messages[0].content }}": "_x",
    "{{ dict.mro() }}{{ messages[0].content }}": "",
    "{{ range(999999999) | list }}{{ messages[0].content }}": "",
    "{{ raise_exception('only pairs') }}": "only pairs",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages[0].content + 1 }}": "",
    "{% generation %}{{ messages[0].content }}": "endgeneration",
    "{{ {'a': messages[0].x} | tojson }}": "",
}


@pytest.fixture(autouse=True)
def their_clock(monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return TODAY

    chat_template_utils._compile_jinja_template.cache_clear()
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    yield
    chat_template_utils._compile_jinja_template.cache_clear()


def theirs(template: str, text: str, thinking: bool) -> str:
    chat = [{"role": "user", "content": text}]
    rendered, _ = chat_template_utils.render_jinja_template(
        [chat],
        chat_template=template,
        add_generation_prompt=True,
        enable_thinking=thinking,
        **NAMES,
    )
    return rendered[0]


def ours(template: str, control=()) -> ChatTemplate:
    return ChatTemplate(template, control, NAMES, TODAY)


def shown(template: str, text: str, thinking: bool = True) -> str:
    made = ours(template).render([{"role": "user", "content": text}], thinking=thinking)
    return plain(made.text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_as_in_transformers(name):
    for thinking in (True, False):
        ours(TEMPLATES[name]).check(thinking)
        for text in TEXTS:
            assert shown(TEMPLATES[name], text, thinking) == theirs(TEMPLATES[name], text, thinking)


def test_the_date_is_the_one_that_was_given():
    assert "Today: 28 Nov 2026" in shown(TEMPLATES["llama_3_2"], "x")
    assert "26 Jul 2024" in shown(TEMPLATES["llama_3_1"], "x")
    assert shown(TEMPLATES["the_clock"], "x") == "2026-11-28 23:59:58 Saturday 332 26% x"


@pytest.mark.parametrize("template", REFUSED)
def test_what_fails_in_transformers_is_refused(template):
    with pytest.raises(Exception):  # noqa: B017  (whatever it is)
        theirs(template, "x", True)
    with pytest.raises(UserError, match="chat_template fails .*" + REFUSED[template]):
        ours(template).check(True)


@pytest.mark.parametrize("chance", ["{{ [1, 2] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_at_random_is_refused(chance):
    with pytest.raises(UserError, match="draws at random"):
        ours(chance + "{{ messages[0].content }}").check(True)


@pytest.mark.parametrize(
    "change",
    [
        "content | replace('\\n', ' ')",
        "content | indent",
        "content[1:]",
        "content | replace('Z', 'z')",
    ],
)
def test_a_template_that_changes_messages_in_another_way_is_refused(change):
    with pytest.raises(UserError, match="chat_template .*(changes|unchanged)"):
        ours("a {{ messages[0]." + change + " }} b").check(True)


@pytest.mark.parametrize(
    ("name", "with_thinking", "without"),
    [
        ("thinking_only", True, True),
        ("deepseek_r1", True, True),
        ("qwen3", False, False),
        ("smollm2", False, False),
    ],
)
def test_whether_the_template_opens_a_thought(name, with_thinking, without):
    assert ours(TEMPLATES[name]).check(True).opens_thought is with_thinking
    assert ours(TEMPLATES[name]).check(False).opens_thought is without


def test_genuine_control_tokens_inside_a_message():
    think, end = ControlToken(1, "<think>"), ControlToken(2, "</think>", rstrip=True)
    made = ours("<think>a {{ messages[0].content | trim }} b</think>", [think, end])

    def parts(*content):
        user = [{"role": "user", "content": list(content)}]
        return [part for part, _ in made.render(user).parts()]

    assert parts(" x <think>", 1, " y ", 2, " z ") == [
        think, "a x <think>", think, " y ", end, "z b", end,
    ]  # fmt: skip
    assert parts(1) == parts("", 1, " ") == [think, "a ", think, " b", end]
    assert parts(" x ") == parts(" ", "x ") == [think, "a x b", end]
    changed = ours("{{ messages[0].content | upper }}{{ messages[0].content[1:] }}", [think, end])
    with pytest.raises(UserError, match="changes the token '<think>' .* to 'think>'"):
        changed.render([{"role": "user", "content": [1]}]).parts()
