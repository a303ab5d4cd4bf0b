"""Chat templates in the shape of public ones, tools and all, and a source of conversations."""
# ruff: noqa: E501  (templates have long lines)

import random

CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
LLAMA_TOKENS = [
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>",
]  # fmt: skip
OTHER_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>"]
OTHER_TOKENS += ["</tool_response>"]

SMOLLM2 = """{% for message in messages %}
{%- if loop.first and messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful small model<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN2_5 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nCall functions as they are described in <tools></tools>:\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\n\\nWrite each call inside <tool_call></tool_call>:\\n<tool_call>\\n{\\"name\\": " }}
    {{- "<name>, \\"arguments\\": <object>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}
            {{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n" }}
{%- if tools is not none %}
    {{- 'Answer with {"name": function, "parameters": object}.\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}" }}{{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# The features of the Qwen3 template that read contents: earlier thoughts are dropped.
THINKER = """{%- set ns = namespace(open=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.open and message.role == "user" and not(message.content.startswith('<tool_response>')
        and message.content.endswith('</tool_response>')) %}
        {%- set ns.open = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

PIECES = [
    "the board", "é", "e\u0301", "中文", "\U0001f468\u200d\U0001f469", "ﬁ", "½", "√", "한", "\u3000",
    "1", "23", "4567", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\x1c", "\u2028", "'s", "{}", '"', "\\n",
    "<", "|", ">", "</", "user", "assistant", "system", "_", ".", "Hello", " world",
]  # fmt: skip
NAMES = ["move", "get_weather", "größe", "f1"]


def text(draw: random.Random, most: int = 12) -> str:
    return "".join(draw.choices(PIECES, k=draw.randint(0, most)))


def value(draw: random.Random, depth: int = 2):
    kind = draw.randrange(7 if depth else 5)
    if kind == 5:
        return [value(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    if kind == 6:
        return {text(draw, 3): value(draw, depth - 1) for _ in range(draw.randint(0, 3))}
    return [text(draw), draw.randint(-99, 9999), draw.random(), draw.random() < 0.5, None][kind]


def tools(draw: random.Random) -> list[dict]:
    return [
        {
            "type": "function",
            "function": {
                "name": draw.choice(NAMES),
                "description": text(draw),
                "parameters": {"type": "object", "properties": {text(draw, 3): {"type": "string"}}},
            },
        }
        for _ in range(draw.randint(1, 2))
    ]


def conversation(
    draw: random.Random, *, call: bool = True, think: bool = False, developer: bool = True
) -> list[dict]:
    """A conversation of random texts: a system message or not, turns, calls with their results."""
    messages = []
    if draw.random() < 0.5:
        role = "developer" if developer and draw.random() < 0.2 else "system"
        messages.append({"role": role, "content": text(draw)})
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": text(draw)})
        if call and draw.random() < 0.4:
            function = {"name": draw.choice(NAMES), "arguments": {text(draw, 3): value(draw)}}
            calls = [{"type": "function", "id": "c1", "function": function}]
            messages.append({"role": "assistant", "content": text(draw, 3), "tool_calls": calls})
            for _ in range(draw.randint(1, 2)):
                result = {"tool_call_id": "c1", "name": function["name"], "content": text(draw)}
                messages.append({"role": "tool", **result})
        if draw.random() < 0.8:
            answer = {"role": "assistant", "content": text(draw)}
            if think and draw.random() < 0.6:
                answer["reasoning_content"] = text(draw)
            messages.append(answer)
    return messages
