"""Chat templates in the styles models come with, written for these tests."""

from __future__ import annotations

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

LLAMA3 = """{{- bos_token }}
{%- set date = date_string if date_string is defined else 'no date' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date + '\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- set ns = namespace(index=0, system=none) -%}
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}
            {{- raise_exception('Only the first message may be of role system.') }}
        {%- endif %}
        {%- set ns.system = message.content %}
        {%- continue %}
    {%- endif %}
    {%- if (message.role == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- set system = ns.system + '\\n\\n' if ns.system and ns.index == 0 else '' %}
        {{- '[INST] ' + system + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content.strip() + eos_token }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
"""

TOOLS = """{%- macro header(role) %}<|im_start|>{{ role }}
{% endmacro %}
{%- if tools %}
    {{- header('system') + 'Tools:' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- '\\n' + tools | tojson(indent=2) + '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {{- header(message.role) + (message.content if message.content else '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
    {%- if loop.index >= 50 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

GENERATION = """{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}
        {% set text = message.content %}
{{ text }}<|im_end|>
        {% endgeneration %}
    {% else %}
{{ message.role }}: {{ message.content }}{{ text }}
    {% endif %}
{% endfor %}
{{ strftime_now('%Y') }}
"""
