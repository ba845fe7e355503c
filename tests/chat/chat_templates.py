"""Chat templates that behave as real ones are said to, written here from their description."""

# A system turn always; reasoning on by default; earlier turns lose theirs; no tags at all become an empty pair.
NEMOTRON_3 = """
{%- set thinks = enable_thinking if enable_thinking is defined else true -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\n<|im_end|>\n' -}}{%- endif -%}
{%- for message in messages -%}
  {%- set content = message.content -%}
  {%- if message.role == 'assistant' -%}
    {%- if '<think>' not in content and '</think>' not in content -%}
      {%- set content = '<think></think>' + content -%}
    {%- endif -%}
    {%- if loop.index0 < last.user -%}
      {%- set content = '<think></think>' + content.split('</think>')[-1].strip() -%}
    {%- endif -%}
  {%- endif -%}
  {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' + ('<think>\n' if thinks else '<think></think>') -}}
{%- endif -%}
"""

# /think or /no_think in any text, on by default; history keeps what follows </think>; a final answer is given a tag.
NANO_V2 = """
{%- set mode = namespace(thinks=true) -%}
{%- for message in messages -%}
  {%- if message.role != 'assistant' and '/no_think' in message.content -%}{%- set mode.thinks = false -%}{%- endif -%}
{%- endfor -%}
{{- '<SPECIAL_10>System\n' -}}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{{- message.content + '\n' -}}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{{- '<SPECIAL_11>User\n' + message.content + '\n' -}}{%- endif -%}
  {%- if message.role == 'assistant' -%}
    {{- '<SPECIAL_11>Assistant\n' -}}
    {%- if loop.last -%}
      {{- ('<think>\n' if mode.thinks else '<think></think>') + message.content.strip() -}}
    {%- else -%}
      {{- message.content.split('</think>')[-1].strip() -}}
    {%- endif -%}
    {{- '\n<SPECIAL_12>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<SPECIAL_11>Assistant\n' + ('<think>\n' if mode.thinks else '<think></think>') -}}
{%- endif -%}
"""

# No end marker: the next header ends the turn.
H_REASONING = """
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{{- '<SPECIAL_10>System\n' + message.content -}}{%- endif -%}
  {%- if message.role == 'user' -%}{{- '\n<SPECIAL_11>User\n' + message.content -}}{%- endif -%}
  {%- if message.role == 'assistant' -%}{{- '\n<SPECIAL_11>Assistant\n' + message.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\n<SPECIAL_11>Assistant\n' -}}{%- endif -%}
"""

# The generation prompt opens nothing by default, but a last answer is printed with an empty pair; contents are trimmed.
EMPTY_PAIR = """
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\n' -}}
  {%- if message.role == 'assistant' and loop.last and '</think>' not in message.content -%}
    {{- '<think>\n\n</think>\n\n' -}}
  {%- endif -%}
  {{- message.content.strip() + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""

STRICT = """
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{{- raise_exception('no system turns here') -}}{%- endif -%}
  {{- message.role + ': ' + message.content + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}
"""
