from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from transformers import AutoTokenizer

from tests.tiny_models import CHATML, END_OF_TEXT, byte_level_tokenizer, write_tokenizer
from understudy.protocol.errors import ConfigurationError, InvalidRequest
from understudy.runtime.chat_template import ChatTemplate
from understudy.runtime.tokenizer import Tokenizer, read_settings

# In the manner of Llama 3: headers, trimmed contents, a date, the system's turn always there.
LLAMA3 = """\
{{- bos_token }}
{%- if date is not defined %}
    {%- if strftime_now is defined %}{%- set date = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday: " + date + "\\n" + system + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot|>' }}
    {%- else %}
        {{- "<|start|>ipython<|end|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""

# In the manner of Mistral: turns must alternate, only the model's own end with the end of text.
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {% generation %}{{- " " + message["content"] + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

# In the manner of Qwen: a default system turn, macros, reasoning cut from all but the last turn.
QWEN = """\
{%- macro turn(role, content) -%}
    {{- '<|im_start|>' + role + '\\n' + content + '<|im_end|>\\n' }}
{%- endmacro %}
{%- if messages[0].role != 'system' %}{{- turn('system', 'You are helpful.') }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 == ns.last and reasoning %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') }}
            {{- '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- else %}
            {{- turn('assistant', content) }}
        {%- endif %}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- turn(message.role, content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Loop controls, and block tags on lines of their own, which trim_blocks and lstrip_blocks take out.
LINES = """\
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% continue %}
    {% endif %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
{{ message['role'] }}: {{ message['content'] }}
{% endfor %}
"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "qwen": QWEN, "lines": LINES}

HELLO = [{"role": "user", "content": " Hello <b>\"world\"</b> & 'größe' \n"}]
LONG = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
    {"role": "user", "content": "three"},
]
REASONED = [*LONG, {"role": "assistant", "content": "four", "reasoning_content": "because\n"}]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "look it up"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "look", "arguments": {"word": "größe", "n": [1, 2.5, None]}},
            }
        ],
    },
    {"role": "tool", "content": "found <it>"},
]
TOKENS = {"bos_token": END_OF_TEXT, "eos_token": "<|im_end|>"}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    write_tokenizer(tmp_path, byte_level_tokenizer(), **TOKENS)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [HELLO, LONG, REASONED, CALLED])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_text_is_that_of_transformers(
    name: str, messages: list[dict[str, Any]], add_generation_prompt: bool, tokenizer: Any
) -> None:
    if name in {"chatml", "mistral", "lines"} and messages is CALLED:
        messages = messages[:1]
    expected = tokenizer.apply_chat_template(
        messages,
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "qwen"])
@pytest.mark.parametrize("content", ["go on", " go on with it  ", "go on\n\n", ""])
def test_a_message_is_continued_as_transformers_does(
    name: str, content: str, tokenizer: Any
) -> None:
    messages = [HELLO[0], {"role": "assistant", "content": content}]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, continue_final_message=True
    )
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == expected


@pytest.mark.parametrize("value", [{"a": [1, None, "ß<>&'"]}, "x", 1.5, [], {"b": 1, "a": 2}])
@pytest.mark.parametrize(
    "call", ["tojson", "tojson(indent=2)", "tojson(ensure_ascii=True)", "tojson(sort_keys=true)"]
)
def test_json_in_templates_is_that_of_transformers(value: Any, call: str, tokenizer: Any) -> None:
    source = "{{ value | " + call + " }}"
    expected = tokenizer.apply_chat_template(
        HELLO, chat_template=source, tokenize=False, value=value
    )
    assert ChatTemplate(source, TOKENS).render(HELLO, kwargs={"value": value}) == expected


def test_template_variables_reach_the_template(tokenizer: Any) -> None:
    template = ChatTemplate(QWEN, TOKENS)
    text = template.render(HELLO, kwargs={"enable_thinking": False})
    assert text.endswith("<think>\n\n</think>\n\n")


def test_the_developer_speaks_as_the_system_where_the_template_knows_no_other() -> None:
    message = [{"role": "developer", "content": "Be brief."}]
    assert "<|im_start|>system\n" in ChatTemplate(CHATML, TOKENS).render(message)
    knowing = CHATML + "{# developer #}"
    assert "<|im_start|>developer\n" in ChatTemplate(knowing, TOKENS).render(message)


PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
]
READS_PARTS = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}[{{ part['text'] }}]{% endfor %}{% endif %}"
    "{% endfor %}"
)


def test_parts_become_one_string_for_a_template_that_reads_strings() -> None:
    assert "\none\ntwo<|im_end|>" in ChatTemplate(CHATML, TOKENS).render(PARTS)
    printed = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert ChatTemplate(printed, TOKENS).render(PARTS) == "one\ntwo"


def test_parts_stay_parts_for_a_template_that_reads_them() -> None:
    assert ChatTemplate(READS_PARTS, TOKENS).render(PARTS) == "[one][two]"


def test_the_last_part_is_continued() -> None:
    template = ChatTemplate(READS_PARTS, TOKENS)
    text = template.render(PARTS, add_generation_prompt=False, continue_final_message=True)
    assert text == "[one][two"


def test_messages_are_not_changed_by_rendering() -> None:
    messages = [{"role": "developer", "content": [{"type": "text", "text": "one"}]}]
    before = repr(messages)
    ChatTemplate(CHATML, TOKENS).render(messages, continue_final_message=True)
    assert repr(messages) == before


def test_what_a_template_says_against_messages_is_told_to_the_client() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        ChatTemplate(MISTRAL, TOKENS).render([HELLO[0], HELLO[0]])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[99]['content'] + '' }}",
        "{{ 1 // 0 }}",
        "{{ messages.nothing.at_all }}",
        "{{ range(10**9) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ '%d' | format('x') }}",
    ],
)
def test_a_template_that_fails_is_no_fault_of_the_server(source: str) -> None:
    with pytest.raises(InvalidRequest, match="does not take these messages"):
        ChatTemplate(source, TOKENS).render(HELLO)


def test_the_sandbox_is_the_cause_of_the_refusal() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate("{{ messages.append(1) }}", TOKENS).render(HELLO)
    assert isinstance(caught.value.__cause__, SecurityError)


def test_a_final_message_that_is_not_shown_cannot_be_continued() -> None:
    with pytest.raises(InvalidRequest, match="does not show the last message"):
        ChatTemplate("nothing", TOKENS).render(HELLO, continue_final_message=True)


def test_a_file_of_its_own_comes_before_the_configured_template(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("from the file")
    template = ChatTemplate.from_directory(tmp_path, configured="configured", special_tokens=TOKENS)
    assert template is not None
    assert template.render(HELLO) == "from the file"


def test_a_model_may_have_no_template(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(tmp_path, configured=None, special_tokens=TOKENS) is None


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ unclosed", "{% generation %}", "x" * (2 << 20)]
)
def test_a_template_that_is_none_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="chat template"):
        ChatTemplate.from_directory(tmp_path, configured=source, special_tokens=TOKENS)


def test_chat_prompts_have_the_tokens_of_transformers(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer(), chat_template=CHATML, **TOKENS)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    template = ChatTemplate.from_directory(
        tmp_path,
        configured=read_settings(tmp_path).chat_template,
        special_tokens=ours.special_tokens,
    )
    assert template is not None
    expected = theirs.apply_chat_template(LONG, add_generation_prompt=True, return_dict=False)
    assert ours.encode(template.render(LONG), add_special_tokens=False) == expected
