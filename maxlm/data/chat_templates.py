"""Chat templates for tokenizers that come without one, and which one a name means.

`plain` and `raw` work with every tokenizer: they write no control token but bos and eos. In text, roles can be forged
there, which control tokens prevent. The others write the formats that published models know.
"""

from __future__ import annotations

import re
from pathlib import Path

from maxlm.config import UserError
from maxlm.config.json_file import read_bytes
from maxlm.data.chat import ChatTemplate, find_chat_template
from maxlm.data.shards import CHAT, TOKENIZER
from maxlm.data.tokenizers import Tokenizer

_MAX_SOURCE = 1 << 20

_NO_TOOLS = """{%- if tools %}{{ raise_exception('this template has no tools; use qwen, llama3 or plain') }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.tool_calls %}
        {{- raise_exception('this template has no tools; use qwen, llama3 or plain') }}
    {%- endif %}
{%- endfor %}
"""
_CHATML = (
    _NO_TOOLS
    + """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
)
_QWEN = """{%- set system = 'You are a helpful assistant.' %}
{%- if messages and messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{ '\\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
_LLAMA_2 = (
    _NO_TOOLS
    + """{%- set system = '' %}
{%- if messages and messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
)
_LLAMA_3 = """{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'user' and tools and (loop.first or (loop.index == 2 and messages[0].role == 'system')) %}
        {{- 'Given the following functions, please respond with a JSON for a function call with its proper ' }}
        {{- 'arguments that best answers the given prompt.\\n\\nRespond in the format {"name": function name, ' }}
        {{- '"parameters": dictionary of argument name and its value}. Do not use variables.\\n\\n' }}
        {%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
    {%- endif %}
    {{- message.content | trim }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n' if message.content or not loop.first else '' }}
        {{- '{"name": "' + call.function.name + '", "parameters": ' }}
        {{- call.function.arguments | tojson }}
        {{- '}' }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
_MISTRAL = (
    _NO_TOOLS
    + """{%- set system = '' %}
{%- if messages and messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
)
_ZEPHYR = (
    _NO_TOOLS
    + """{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
)
_PLAIN = """{{- bos_token }}
{%- if tools %}
    {{- 'Tools:' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool.function | tojson }}{% endfor %}
    {{- '\\n\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- 'Assistant:' + (' ' + message.content if message.content else '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\nCall: {"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}' }}
        {%- endfor %}
        {{- eos_token + '\\n\\n' }}
    {%- else %}
        {{- message.role | capitalize + ': ' + message.content + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
_RAW = (
    _NO_TOOLS
    + """{{- bos_token }}
{%- for message in messages %}
    {{- message.content + (eos_token if message.role == 'assistant' else '') }}
{%- endfor %}"""
)

BUILT_IN: dict[str, tuple[str, tuple[str, ...]]] = {
    "chatml": (_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama2": (_LLAMA_2, ("<s>", "</s>")),
    "llama3": (_LLAMA_3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": (_MISTRAL, ("<s>", "</s>")),
    "qwen": (_QWEN, ("<|im_start|>", "<|im_end|>")),
    "zephyr": (_ZEPHYR, ("</s>",)),
    "plain": (_PLAIN, ()),
    "raw": (_RAW, ()),
}
"""By name: the source in Jinja2, and the control tokens that it needs. `raw` writes texts side by side, no roles."""


def choose_template(name: str | None, tokenizer: Tokenizer, folder: Path | None = None) -> ChatTemplate:
    """The template of a built-in name, of a file, or of a published model's folder.

    Args:
        name: one of `BUILT_IN`, or a file of Jinja2; None: the folder's own, or `plain` if it has none.
        tokenizer: whose names of bos and eos the template writes.
        folder: where the tokenizer lies, perhaps with a template beside it, or, of prepared data and of a run, in their
            folder `chat`.

    Raises:
        UserError: there is no such template, or the tokenizer has not the control tokens that it needs.
    """
    if name is None:
        own = None if folder is None else find_chat_template(folder)
        if own is None and folder is not None and folder.name == TOKENIZER:  # of prepared data or a run
            own = find_chat_template(folder.parent / CHAT)
        if own is not None:
            return own
        name = "plain"
    by_id = {i: word for word, i in tokenizer.specials.items()}
    if tokenizer.eos_id not in by_id:
        raise UserError(
            f"the token that ends a document, {tokenizer.name_of(tokenizer.eos_id)!r}, is no control token of the "
            "tokenizer; mark it special in tokenizer.json, or name another with eos"
        )
    bos = "" if tokenizer.bos_id is None else by_id.get(tokenizer.bos_id, "")
    tokens = {"eos_token": by_id[tokenizer.eos_id], "bos_token": bos}
    if name in BUILT_IN:
        source, needed = BUILT_IN[name]
        if missing := [word for word in needed if word not in tokenizer.specials]:
            raise UserError(
                f"template {name}: the tokenizer has no control token {' and no '.join(missing)}; use plain, which "
                "needs none"
            )
        known = {"bos_token": "<s>", "eos_token": "</s>"}  # of the formats that are made of these two
        tokens |= {key: word for key, word in known.items() if word in needed}
        return ChatTemplate(sources={"default": source}, tokens=tokens, place=f"template {name}")
    file = Path(name)
    if not re.search(r"[./]", name) and not file.is_file():
        raise UserError(f"template {name!r}: must be one of {', '.join(BUILT_IN)}, or a file of Jinja2")
    try:
        source = read_bytes(file, _MAX_SOURCE).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); name a file of Jinja2") from error
    return ChatTemplate(sources={"default": source}, tokens=tokens, place=str(file))
